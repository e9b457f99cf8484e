"""Photos and people that are there twice."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idadapter_core.data.dedupe import dedupe
from idadapter_core.data.index import Index, read_index, write_index
from idadapter_core.data.rows import Row
from idadapter_core.data.split import SplitSettings
from idadapter_core.errors import ConfigError


def row(number: int, identity: str, sha: str = "", phash: str = "") -> Row:
    return Row(
        number,
        f"{number}.png",
        sha256=(sha or f"{number:x}").rjust(64, "0"),
        width=9,
        height=9,
        identity=identity,
        box=(0, 0, 1, 1),
        landmarks=((0, 0),) * 5,
        phash=phash or f"{number * 0x1111_1111_1111_1111 % 2**64:016x}",
        split="train",
    )


def directions(people: list[int]) -> Tensor:
    """An embedding per photo; photos of one number look alike, and 10 looks like 1 by a cosine of 0.8."""
    embeddings = torch.zeros(len(people), 512)
    for place, person in enumerate(people):
        embeddings[place, person] = 5.0
        if person == 10:
            embeddings[place, 1] = 5.0 * 0.8 / 0.6
    return embeddings


def indexed(folder: Path, rows: list[Row], people: list[int]) -> Index:
    facts = {"split": {"share": 0.2, "seed": 3, "threshold": 0.6}}
    return write_index(folder / "index.parquet", folder, rows, directions(people), facts)


def found(index: Index) -> dict[int, tuple[str, str]]:
    return {row.number: (row.status, row.reason) for row in index.rows if row.status != "ok"}


def test_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(0, "a", sha="f"), row(1, "b", sha="f"), row(2, "", sha="e"), row(3, "", sha="e"), row(4, "c")]
    rows[4] = replace(row(4, "c", sha="f"), status="blur", reason="blurred", split="")
    made = dedupe(indexed(tmp_path, rows, [1, 2, 3, 4, 5]), tmp_path / "clean.parquet")
    assert found(made) == {
        1: ("duplicate", "the same bytes as 0.png"),
        3: ("duplicate", "the same bytes as 2.png"),
        4: ("blur", "blurred"),
    }


def test_looks_the_same(tmp_path: Path) -> None:
    rows = [
        row(0, "a", phash="00000000000000ff"),
        row(1, "a", phash="000000000000000f"),  # 4 bits
        row(2, "a", phash="0000000000001fff"),  # 5 bits from the first
        row(3, "b", phash="00000000000000ff"),  # somebody else
        row(4, "", phash="00000000000000ff"),
        row(5, "", phash="00000000000000ff"),
    ]
    made = dedupe(indexed(tmp_path, rows, [1, 1, 1, 2, 3, 4]), tmp_path / "clean.parquet")
    assert found(made) == {1: ("duplicate", "looks like 0.png")}


def test_one_person_under_two_names_is_set_aside(tmp_path: Path) -> None:
    rows = [row(0, "a"), row(1, "b"), row(2, "b"), row(3, "c"), row(4, "d"), row(5, "")]
    made = dedupe(indexed(tmp_path, rows, [10, 1, 1, 3, 3, 1]), tmp_path / "clean.parquet")
    assert found(made) == {
        0: ("duplicate", "a is b, who has more photos or came first (cosine 0.80)"),
        4: ("duplicate", "d is c, who has more photos or came first (cosine 1.00)"),
    }
    assert [r.identity for r in made.rows] == ["a", "b", "b", "c", "d", ""]
    assert all(r.split == "" for r in made.rows if r.status == "duplicate")


def test_or_merged(tmp_path: Path) -> None:
    rows = [row(0, "a"), row(1, "b"), row(2, "b", phash=row(0, "").phash), row(3, "c")]
    index = indexed(tmp_path, rows, [10, 1, 1, 3])
    made = dedupe(index, tmp_path / "clean.parquet", people="merge")
    assert [r.identity for r in made.rows] == ["b", "b", "b", "c"]
    assert found(made) == {2: ("duplicate", "looks like 0.png")}
    assert found(dedupe(index, tmp_path / "far.parquet", threshold=0.9)) == {}


def test_the_result_is_split_anew_and_keeps_the_rest(tmp_path: Path) -> None:
    rows = [row(n, f"p{n // 2}") for n in range(20)]
    index = indexed(tmp_path, rows, [n // 2 for n in range(20)])
    before = index.path.read_bytes()
    made = dedupe(index, tmp_path / "clean.parquet")
    assert index.path.read_bytes() == before
    assert made.facts["split"]["seed"] == 3
    assert sum(r.split == "test" for r in made.rows) == 4
    assert read_index(made.path).rows == made.rows
    torch.testing.assert_close(made.embeddings(), index.embeddings())
    other = dedupe(index, tmp_path / "other.parquet", split=SplitSettings(share=0.5))
    assert sum(r.split == "test" for r in other.rows) == 10
    with pytest.raises(ConfigError, match="quarantine, merge"):
        dedupe(index, tmp_path / "no.parquet", people="forget")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("size", [100, 10_000])
def test_a_full_disk_is_told_once(tmp_path: Path, size: int) -> None:
    """Of the embeddings first, and of the rows where those still found room."""
    import resource  # absent on Windows

    rows = [replace(row(number, f"{number}"), caption="a" * 3000) for number in range(4)]
    index = indexed(tmp_path, rows, [1, 2, 3, 4])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(ConfigError) as raised:
            dedupe(index, tmp_path / "new" / "clean.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = f"{raised.value}"
    assert message.count("cannot be written") == message.count("Choose another folder") == 1
    assert str(tmp_path / "new") in message
    assert not (tmp_path / "new" / "clean.parquet").exists()
