"""Samples: a function of seed, epoch and row; references; shares; prompts; which rows count."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from idadapter_core.data.index import Row, read_index
from idadapter_core.data.references import Photo, photo_pictures, photos_of_variants, references_for
from idadapter_core.errors import ConfigError
from idadapter_core.randomness import generator
from idadapter_core.training.samples import (
    VALIDATION,
    Batch,
    MicroBatches,
    Samples,
    collate,
    prompt_of,
    usable_rows,
)
from tests.core.training.sampled import (
    TIMESTEPS,
    Zeros,
    config_of,
    equal,
    fast,
    index_of,
    levels,
    row_of,
    same,
    small_heads,
)
from tests.tiny.toy import Toy

# ------------------------------------------------------------------------------------------------ what decides a sample


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("method", ["idadapter", "uniid"])
def test_workers_change_nothing(toy: Toy, tmp_path: Path, method: str) -> None:
    """Through two epochs and a half, with pictures, crops and heads."""
    config = toy.config(
        tmp_path, adapter={"method": method}, train={"steps": 5, "global_batch_size": 4, "seed": 3}
    )
    index = read_index(toy.index)
    rows = index.usable("train")[:8]
    samples = Samples(index, rows, config, TIMESTEPS, None, small_heads if method == "idadapter" else None)

    def batches(workers: int) -> list[Any]:
        keys = MicroBatches(config, len(rows), 0)
        return list(DataLoader(samples, batch_sampler=keys, collate_fn=collate, num_workers=workers))

    alone = batches(0)
    assert len(alone) == 5
    assert alone[0].crops.shape == (4, 1 if method == "uniid" else 3, 3, 112, 112)
    for workers in (1, 4):
        found = batches(workers)
        assert len(found) == len(alone)
        assert all(map(same, found, alone))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_share_one_sequence(world: int, accumulate: int) -> None:
    """Ten photos in batches of four: an epoch ends within a batch, and the order of each epoch is its own."""
    config = config_of(train={"steps": 10, "global_batch_size": 4, "gradient_accumulation_steps": accumulate})
    whole = list(MicroBatches(config_of(train={"steps": 10, "global_batch_size": 4}), 10, 0))
    shares = [list(MicroBatches(config, 10, 0, rank=rank, world=world)) for rank in range(world)]
    for step in range(10):
        together = [
            key
            for micro in range(accumulate)
            for rank in range(world)
            for key in shares[rank][step * accumulate + micro]
        ]
        assert together == whole[step]
    keys = list(itertools.chain(*whole))
    epochs = [[place for epoch, place in keys if epoch == number] for number in range(4)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len(set(map(tuple, epochs))) == 4
    gone_on = MicroBatches(config, 10, 7, rank=world - 1, world=world)
    assert list(gone_on) == shares[-1][7 * accumulate :]
    assert len(gone_on) == 3 * accumulate


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.global_batch_size is 6.*2 processes.*multiple of 4"):
        MicroBatches(
            config_of(train={"global_batch_size": 6, "gradient_accumulation_steps": 2}), 10, 0, world=2
        )


def test_a_sample_depends_on_seed_epoch_and_row_alone() -> None:
    """Not on the other people, its place in the list, or on what was drawn before."""
    rows = [row_of(number, f"person {number // 3}") for number in range(9)]
    config = config_of(train={"seed": 1})
    among_all, few = fast(rows, config), fast(rows[3:6], config)
    for epoch in (0, 1, VALIDATION):
        assert same(among_all.sample(epoch, 4), few.sample(epoch, 1))
    first = among_all.sample(0, 4)
    others = [
        among_all.sample(1, 4),
        among_all.sample(0, 5),
        fast(rows, config_of(train={"seed": 2})).sample(0, 4),
    ]
    for other in others:
        assert not torch.equal(first["noise"], other["noise"])
        assert not torch.equal(first["posterior"], other["posterior"])
    assert not torch.equal(first["noise"], first["posterior"])


def test_a_setting_changes_nothing_but_itself() -> None:
    rows = [row_of(number) for number in range(4)]
    plain = fast(rows, config_of(data={"resolution": 64, "references": 2, "flip": False}))
    other = fast(
        rows,
        config_of(data={"resolution": 64, "references": 2, "flip": True}, train={"drop_identity": 0.9}),
    )
    changed = set()
    for epoch in range(20):
        one, two = plain.sample(epoch, 1), other.sample(epoch, 1)
        changed |= {name for name in one if not equal(one[name], two[name])}
    assert changed == {"identity", "prompts", "landmarks", "sizes"}


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("size", range(1, 7))
def test_references(size: int, count: int) -> None:
    """Never the target where there are others, no photo twice, variants only where photos are too few; and a cache has them all."""
    person = [row_of(number) for number in range(size)]
    stranger = row_of(50, "stranger")
    asked = {Photo(row) for row in [*person, stranger]}  # as targets
    firsts = set()
    for target, seed in itertools.product(person, range(150)):
        photos = references_for(target, person, count, generator(seed))
        assert len(set(photos)) == len(photos) == count
        others = {row.number for row in person} - {target.number} or {target.number}
        assert {photo.row.number for photo in photos} <= others
        used = [sum(photo.row.number == number for photo in photos) for number in others]
        assert max(used) - min(used) <= 1
        for number in others:
            variants = [photo.variant for photo in photos if photo.row.number == number]
            assert variants == list(range(len(variants)))
        asked |= set(photos)
        firsts.add(photos[0].row.number)
    asked |= {photo for s in range(2) for photo in references_for(stranger, [stranger], count, generator(s))}
    assert firsts == {row.number for row in person}
    assert set(photos_of_variants([*person, stranger], count)) == asked


def test_whose_person_is_not_known_is_somebody_of_their_own() -> None:
    rows = [row_of(number, "") for number in range(3)]
    sample = fast(rows, config_of()).sample(0, 1)
    assert sample["embedding"].tolist() == [
        [1, 0],
        [1, 1],
        [1, 0],
    ]  # the photo, its first variant; the target


def test_references_come_with_their_target(toy: Toy, tmp_path: Path) -> None:
    """Of the same person, the target's face last, and no head of the target: it is not looked at."""
    index = read_index(toy.index)
    rows = index.usable("train")
    samples = Samples(index, rows, toy.config(tmp_path), TIMESTEPS, None, small_heads)
    sample = samples.sample(0, 5)
    assert sample["crops"].shape == (3, 3, 112, 112)
    assert sample["heads"].shape == (2, 3, 32, 32)
    own, _ = photo_pictures(index.load(rows[5]), Photo(rows[5]))
    assert np.array_equal(levels(sample["crops"][-1]).round(), own)
    persons = [row for row in rows if row.identity == rows[5].identity and row is not rows[5]]
    theirs = [photo_pictures(index.load(row), Photo(row))[0] for row in persons]
    for crop in sample["crops"][:-1]:
        assert any(np.array_equal(levels(crop).round(), face) for face in theirs)


# ------------------------------------------------------------------------------------------------ shares and prompts


def test_shares_of_what_is_dropped() -> None:
    shares = {"drop_identity": 0.2, "drop_text": 0.1, "drop_both": 0.05}
    rows = [row_of(number, caption="a photo of a cat") for number in range(20)]
    store = Zeros()
    samples = fast(rows, config_of(train=shares), store)
    drawn = [samples.sample(epoch, place) for epoch in range(100) for place in range(20)]
    kinds = [(bool(sample["identity"]), bool(sample["prompts"])) for sample in drawn]
    found = {kind: kinds.count(kind) / len(kinds) for kind in itertools.product((True, False), repeat=2)}
    expected = {(False, True): 0.2, (True, False): 0.1, (False, False): 0.05, (True, True): 0.65}
    assert found == pytest.approx(expected, abs=0.03)
    assert sum(store.mirrored) / len(drawn) == pytest.approx(0.5, abs=0.04)
    timesteps = torch.stack([sample["timesteps"] for sample in drawn])
    assert timesteps.min() < 20
    assert timesteps.max() in range(980, 1000)
    assert timesteps.float().mean() == pytest.approx(500, abs=25)
    measured = [samples.sample(VALIDATION - number, place) for number in range(20) for place in range(20)]
    assert all(sample["identity"] and sample["prompts"] for sample in measured)
    assert not any(store.mirrored[len(drawn) :])


@pytest.mark.parametrize(
    ("method", "template", "values", "expected"),
    [
        ("idadapter", "", {"caption": "two cats"}, "two cats"),
        ("idadapter", "", {}, "a photo of a person"),
        ("idadapter", "", {"class_noun": "woman"}, "a photo of a woman"),
        ("uniid", "", {"caption": "two cats", "class_noun": "man"}, "a photo of a man"),
        ("uniid", "", {}, "a photo of a person"),
        (
            "uniid",
            "<caption>, a <class word>",
            {"caption": "two cats", "class_noun": "man"},
            "two cats, a man",
        ),
        ("idadapter", "a face", {"caption": "two cats"}, "a face"),
    ],
)
def test_prompts(method: str, template: str, values: dict[str, Any], expected: str) -> None:
    """Each sample has its own noun: not that of the first one in the batch."""
    config = config_of(adapter={"method": method}, data={"prompt": template})
    assert prompt_of(row_of(0, **values), config) == expected


def test_a_batch_keeps_each_prompt_and_noun() -> None:
    rows = [row_of(number, class_noun=noun) for number, noun in enumerate(("man", "woman", "person"))]
    none = {"drop_identity": 0.0, "drop_text": 0.0, "drop_both": 0.0}
    samples = fast(rows, config_of(train=none))
    batch = collate([samples[0, place] for place in (2, 0, 1)])
    assert isinstance(batch, Batch)
    assert batch.class_nouns == ("person", "man", "woman")
    assert batch.prompts == ("a photo of a person", "a photo of a man", "a photo of a woman")
    assert batch.rows == (2, 0, 1)
    assert batch.to("cpu").identity.tolist() == [True] * 3


# ------------------------------------------------------------------------------------------------ which rows count


def test_people_with_few_photos_are_left_out(tmp_path: Path) -> None:
    identities = ["a", "a", "a", "b", "", "c", "c"]
    rows = [row_of(number, identity) for number, identity in enumerate(identities)]
    rows[5] = dataclasses.replace(rows[5], split="test")
    rows[6] = dataclasses.replace(rows[6], split="test")
    index = index_of(tmp_path, rows)

    def numbers(least: int, split: str = "train") -> list[int]:
        return [row.number for row in usable_rows(index, config_of(data={"min_photos": least}), split)]

    assert numbers(1) == [0, 1, 2, 3, 4]
    assert numbers(2) == numbers(3) == [0, 1, 2]
    assert numbers(2, "test") == [5, 6]
    assert numbers(3, "test") == []
    with pytest.raises(ConfigError, match="no photo is left to train on.*min_photos = 4.*stats"):
        numbers(4)


def test_too_many_bad_photos_stop_a_run_and_are_named(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(10)]
    rows[3] = Row(number=3, source="broken.png", status="corrupt", reason="truncated")
    rows[7] = Row(number=7, source="wall.png", status="no_face", reason="no face was found")
    rows[8] = Row(number=8, source="again.png", status="duplicate", reason="same as 1")
    index = index_of(tmp_path, rows)
    kept = usable_rows(index, config_of(data={"max_bad_share": 0.2}), "train")
    assert [row.number for row in kept] == [0, 1, 2, 4, 5, 6, 9]
    with pytest.raises(ConfigError, match=r"20\.0% of its photos.*allows 19\.0%") as raised:
        usable_rows(index, config_of(data={"max_bad_share": 0.19}), "train")
    assert "broken.png: corrupt, truncated" in str(raised.value)
    assert "wall.png: no_face, no face was found" in str(raised.value)
    assert "again.png" not in str(raised.value)
