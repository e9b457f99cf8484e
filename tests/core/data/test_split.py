"""Test people are chosen by embedding, in whole clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from idadapter_core.data import split as splitting
from idadapter_core.data.rows import Row
from idadapter_core.data.split import SplitSettings, clusters, describe_split, largest_cosine, split_rows
from idadapter_core.errors import ConfigError


def people(sizes: Sequence[int], seed: int = 0) -> tuple[list[Row], Tensor]:
    """Photos of people far from each other; size 1 stands for a photo of nobody known."""
    generator = torch.Generator().manual_seed(seed)
    rows, embeddings = [], []
    for person, size in enumerate(sizes):
        center = torch.randn(512, generator=generator)
        for _ in range(size):
            name = f"p{person}" if size > 1 else ""
            rows.append(Row(len(rows), f"{len(rows)}.png", identity=name))
            embeddings.append(3 * (center + 0.1 * torch.randn(512, generator=generator)))
    return rows, torch.stack(embeddings)


def sides(rows: Sequence[Row]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.identity or row.source, set()).add(row.split)
    return found


def test_the_share_is_reached_by_whole_people() -> None:
    rows, embeddings = people([3] * 40)
    marked, facts = split_rows(rows, embeddings, SplitSettings(share=0.1))
    assert sum(row.split == "test" for row in marked) == facts["test_photos"] == 12
    assert facts["test_people"] == 4
    assert all(len(found) == 1 for found in sides(marked).values())
    assert facts["largest_cosine"] < 0.6


def test_the_seed_chooses_and_added_photos_do_not() -> None:
    rows, embeddings = people([3] * 40)
    first, _ = split_rows(rows, embeddings, SplitSettings(share=0.1))
    other, _ = split_rows(rows, embeddings, SplitSettings(share=0.1, seed=1))
    assert sides(first) != sides(other)
    more_rows, more = people([3] * 60)
    later, _ = split_rows(more_rows, more, SplitSettings(share=0.1))
    before, after = sides(first), sides(later)
    moved = [name for name in before if before[name] == {"test"} and after[name] == {"train"}]
    assert len(moved) <= 3, "most of them stay"


def test_unknown_people_are_split_by_photo_and_by_likeness() -> None:
    rows, embeddings = people([1] * 30)
    embeddings[20] = embeddings[3] * 2
    for seed in range(20):
        marked, facts = split_rows(rows, embeddings, SplitSettings(share=0.3, seed=seed))
        assert marked[20].split == marked[3].split
        assert facts["clusters"] == 29


def test_only_usable_rows_are_split() -> None:
    rows, embeddings = people([4, 4, 4])
    rows[0] = replace(rows[0], status="blur", reason="blurred", split="test")
    marked, facts = split_rows(rows, embeddings, SplitSettings(share=0.3))
    assert marked[0].split == ""
    assert sum(row.split != "" for row in marked) == 11


def test_a_giant_cluster_stays_in_train() -> None:
    rows, embeddings = people([50, 2, 2, 2])
    marked, _ = split_rows(rows, embeddings, SplitSettings(share=0.1))
    assert sides(marked)["p0"] == {"train"}
    assert sum(row.split == "test" for row in marked) == 6


def test_one_person_alone_is_never_for_testing() -> None:
    rows, embeddings = people([5])
    marked, facts = split_rows(rows, embeddings, SplitSettings(share=0.5))
    assert {row.split for row in marked} == {"train"}
    assert "no test photos" in describe_split(facts)


def test_no_share_no_test() -> None:
    rows, embeddings = people([2, 2])
    marked, facts = split_rows(rows, embeddings, SplitSettings(share=0))
    assert {row.split for row in marked} == {"train"}
    assert "warning" not in describe_split(facts)
    assert split_rows([], torch.zeros(0, 512), SplitSettings())[0] == []


def test_clusters_are_connected_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain search, with blocks that are smaller than the clusters, and chains across them."""
    monkeypatch.setattr(splitting, "_BLOCK", 7)
    generator = torch.Generator().manual_seed(1)
    means = torch.nn.functional.normalize(torch.randn(100, 3, generator=generator), dim=1)
    close = means @ means.T > 0.93
    expected, left = [], set(range(100))
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {int(j) for i in edge for j in close[i].nonzero()} - group
        expected.append(sorted(group))
        left -= group
    assert any(len(group) > 10 for group in expected)
    assert any(len(group) == 1 for group in expected)
    assert clusters(means, 0.93) == expected


def test_the_largest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "_BLOCK", 3)
    first, second = torch.nn.functional.normalize(torch.randn(2, 10, 16), dim=2)
    assert largest_cosine(first, second) == pytest.approx(float((first @ second.T).max()))
    assert largest_cosine(first, second[:0]) is None


@pytest.mark.gpu
def test_a_gpu_finds_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    means = torch.nn.functional.normalize(
        torch.randn(9000, 8, generator=torch.Generator().manual_seed(1)), dim=1
    )
    found = clusters(means, 0.9)
    monkeypatch.setattr(splitting, "_device", lambda: "cpu")
    assert clusters(means, 0.9) == found


@pytest.mark.parametrize("settings", [{"share": 1.0}, {"share": -0.1}, {"threshold": 1.0}])
def test_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SplitSettings(**settings)  # type: ignore[arg-type]
