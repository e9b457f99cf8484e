"""Samples: a function of seed, epoch and row; pictures and landmarks that agree; references; shares; prompts; which rows count.

One file, because all of it is about one pure function.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from idadapter_core.config import parse_config
from idadapter_core.data.index import Index, read_index, write_index
from idadapter_core.data.references import PhotoVariant, photo_pictures, references_for, variants_of
from idadapter_core.data.rows import Row, as_rows
from idadapter_core.errors import ConfigError, FaceError
from idadapter_core.faces.align import TEMPLATE, align_face
from idadapter_core.faces.enrich import variant
from idadapter_core.randomness import generator, seed_of
from idadapter_core.training.config import RunConfig
from idadapter_core.training.samples import (
    VALIDATION,
    Batch,
    MicroBatches,
    Samples,
    collate,
    place,
    prompt_of,
    target_picture,
    usable_rows,
)
from tests.tiny.face_package import DOT_COLORS, MarkedFace, synthesize
from tests.tiny.toy import Toy

MIRRORED = [1, 0, 2, 4, 3]
TIMESTEPS = 1000
# Width and height of a photo, and its face: in the middle, near an edge, turned, in a corner.
SHOTS: dict[str, tuple[int, int, MarkedFace]] = {
    "square": (240, 240, MarkedFace(120, 118, 60)),
    "landscape": (400, 240, MarkedFace(250, 118, 60, roll=15)),
    "at the left edge": (400, 240, MarkedFace(62, 118, 60)),
    "at the right edge": (401, 241, MarkedFace(340, 118, 60, yaw=12)),
    "portrait, at the bottom": (240, 420, MarkedFace(118, 350, 60)),
    "small": (110, 100, MarkedFace(60, 50, 34)),
}


def row_of(number: int, identity: str = "somebody", **values: Any) -> Row:
    """A row that is ok, of a photo that nobody opens."""
    given: dict[str, Any] = {
        "source": f"{identity}/{number}.png",
        "sha256": f"{number:064x}",
        "width": 200,
        "height": 100,
        "box": (60.0, 20.0, 120.0, 90.0),
        "landmarks": tuple(map(tuple, (TEMPLATE / 2 + [60, 20]).tolist())),
        "split": "train",
        **values,
    }
    return Row(number=number, identity=identity, **given)


def index_of(folder: Path, rows: list[Row]) -> Index:
    return write_index(folder / "index.parquet", folder, rows, torch.zeros(len(rows), 512), {})


def draw(folder: Path, width: int, height: int, face: MarkedFace) -> tuple[Index, Row]:
    """A photo on disk, with the index of it alone."""
    path = folder / "photo.png"
    Image.fromarray(synthesize(width, height, [face])).save(path)
    x1, y1 = face.landmarks.min(0) - 0.4 * face.eye_distance
    x2, y2 = face.landmarks.max(0) + 0.4 * face.eye_distance
    row = row_of(
        0,
        source=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        width=width,
        height=height,
        box=(float(x1), float(y1), float(x2), float(y2)),
        # Dots are painted at whole pixels.
        landmarks=tuple((float(x), float(y)) for x, y in face.landmarks.round()),
    )
    return index_of(folder, [row]), row


def dots(picture: NDArray[Any]) -> NDArray[np.float64]:
    """Where the five colours are in a picture (H, W, 3) in 0..255: (5, 2)."""
    found = []
    for color in DOT_COLORS:
        distance = np.linalg.norm(picture.astype(float) - color, axis=-1)
        ys, xs = np.nonzero(distance < 120)
        assert len(xs), color
        weight = 120 - distance[ys, xs]
        found.append((np.average(xs, weights=weight), np.average(ys, weights=weight)))
    return np.array(found)


def levels(tensor: Tensor) -> NDArray[Any]:
    return ((tensor.movedim(0, -1) + 1) * 127.5).numpy()


def config_of(**sections: dict[str, Any]) -> RunConfig:
    content: dict[str, Any] = {"data": {"resolution": 64, "references": 2}, **sections}
    return parse_config(RunConfig, content)


class Zeros:
    """A store that answers at once, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.mirrored: list[bool] = []

    def latents(self, row: Row, mirrored: bool) -> Tensor:
        self.mirrored.append(mirrored)
        return torch.zeros(8, 8, 8)

    def photo(self, photo: PhotoVariant) -> Mapping[str, Tensor]:
        features = torch.tensor([float(photo.row.number), float(photo.variant)])
        return {"embedding": features, "patch_tokens": features[None], "class_embedding": features}


def fast(rows: list[Row], config: RunConfig, store: Zeros | None = None) -> Samples:
    """Samples without pictures."""
    index = Index(Path("index.parquet"), Path(), tuple(rows), {}, "")
    return Samples(index, rows, config, TIMESTEPS, store or Zeros())


def same(one: Mapping[str, Any] | Batch, other: Mapping[str, Any] | Batch) -> bool:
    """Whether two samples or batches hold the same bits."""
    left, right = (
        {f.name: getattr(side, f.name) for f in dataclasses.fields(side)} if isinstance(side, Batch) else side
        for side in (one, other)
    )
    return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple) and one and isinstance(one[0], Tensor):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


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
    samples = Samples(index, rows, config, TIMESTEPS, None, _small_heads if method == "idadapter" else None)

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


def _small_heads(heads: Any) -> Tensor:
    return torch.stack([torch.from_numpy(head[:32, :32].copy()).movedim(-1, 0).float() for head in heads])


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
        changed |= {name for name in one if not _equal(one[name], two[name])}
    assert changed == {"identity", "prompts", "landmarks", "sizes"}


# ------------------------------------------------------------------------------------------------ pictures and landmarks


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("name", SHOTS)
def test_the_dots_of_a_drawn_face_lie_at_the_landmarks(tmp_path: Path, name: str, mirrored: bool) -> None:
    index, row = draw(tmp_path, *SHOTS[name])
    resolution = 128
    picture = levels(target_picture(index.load(row), row, resolution, mirrored))
    assert picture.shape == (resolution, resolution, 3)
    points = place(row, resolution, mirrored).points(np.array(row.landmarks))
    # The left eye of a mirrored picture was the right one.
    expected = dots(picture)[MIRRORED if mirrored else slice(None)]
    assert np.abs(points - expected).max() < 0.6
    assert points[0, 0] < points[1, 0]


def test_samples_bring_both(tmp_path: Path) -> None:
    """Half of the targets are mirrored, their landmarks with them; none that is measured is."""
    index, row = draw(tmp_path, *SHOTS["landscape"])
    samples = Samples(index, [row], config_of(adapter={"method": "uniid"}), TIMESTEPS)
    turned = []
    for epoch in range(VALIDATION - 2, 24):
        sample = samples.sample(epoch, 0)
        found = dots(levels(sample["pictures"]))
        is_mirrored = bool(found[0, 0] > found[1, 0])
        expected = found[MIRRORED if is_mirrored else slice(None)]
        assert np.abs(sample["landmarks"].numpy() - expected).max() < 0.6
        turned.append(is_mirrored)
    assert not any(turned[:2])
    assert 6 <= sum(turned) <= 18


def test_noise_has_the_channels_of_the_base_model(tmp_path: Path) -> None:
    index, row = draw(tmp_path, *SHOTS["landscape"])
    config = config_of(adapter={"method": "uniid"})
    for channels in (4, 12):
        sample = Samples(index, [row], config, TIMESTEPS, latent_channels=channels).sample(0, 0)
        assert sample["noise"].shape[0] == sample["posterior"].shape[0] == channels


def test_a_mirrored_target_is_the_target_of_the_mirrored_photo(tmp_path: Path) -> None:
    """In its picture, its landmarks, and what SDXL is told of how it was cut."""
    index, row = draw(tmp_path, *SHOTS["landscape"])
    assert row.box is not None
    image = index.load(row)
    x1, y1, x2, y2 = row.box
    points = np.array(row.landmarks)[MIRRORED]
    turned = dataclasses.replace(
        row,
        box=(row.width - x2, y1, row.width - x1, y2),
        landmarks=tuple((row.width - 1 - x, y) for x, y in points.tolist()),
    )
    one, other = place(row, 64, True), place(turned, 64, False)
    np.testing.assert_array_equal(one.picture(image), other.picture(np.ascontiguousarray(image[:, ::-1])))
    np.testing.assert_allclose(one.points(np.array(row.landmarks)), other.points(np.array(turned.landmarks)))
    assert one.size_conditioning(row) == pytest.approx(other.size_conditioning(turned))
    assert one.size_conditioning(row)[3] != place(row, 64, False).size_conditioning(row)[3] != 0


@pytest.mark.parametrize("number", range(5))
def test_photos_are_aligned_in_all_variants(tmp_path: Path, number: int) -> None:
    """The dots of a turned, mirrored and recoloured photo lie where every aligned face has them."""
    index, row = draw(tmp_path, *SHOTS["landscape"])
    crop, head = photo_pictures(index.load(row), PhotoVariant(row, number))
    assert crop.shape == (112, 112, 3)
    assert head.shape[0] == head.shape[1]
    if number:  # other light: look for the dot in what is left of its colour
        plain, _ = photo_pictures(index.load(row), PhotoVariant(row))
        assert np.abs(crop.astype(float) - plain).mean() > 2
    found = dots(crop)
    upright = np.abs(found - TEMPLATE).max()
    mirrored = np.abs(found[MIRRORED] - TEMPLATE).max()
    assert min(upright, mirrored) < 3.5  # a drawn face is not quite of the template's shape
    eyes = dots(head)[[0, 1]]
    assert np.abs(eyes.mean(0) / len(head) - 0.5).max() < 0.2
    assert np.linalg.norm(eyes[0] - eyes[1]) > 0.2 * len(head)


def test_a_variant_without_the_face_is_the_photo_itself(tmp_path: Path) -> None:
    """A face at the edge is turned out of the picture by some variants; the run goes on."""
    index, row = draw(tmp_path, 400, 400, MarkedFace(4, 320, 50))
    image = index.load(row)
    plain, _ = photo_pictures(image, PhotoVariant(row))
    lost = []
    for number in range(1, 30):
        turned, points = variant(image, np.array(row.landmarks), seed_of(row.sha256), number)
        try:
            align_face(turned, tuple(map(tuple, points.tolist())))
        except FaceError:
            lost.append(number)
    assert 0 < len(lost) < 29
    for number in range(1, 30):
        crop, _ = photo_pictures(image, PhotoVariant(row, number))
        assert np.array_equal(crop, plain) == (number in lost)


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("size", range(1, 7))
def test_references(size: int, count: int) -> None:
    """Never the target where there are others, no photo twice, variants only where photos are too few; and a cache has them all."""
    person = [row_of(number) for number in range(size)]
    stranger = row_of(50, "stranger")
    asked = {PhotoVariant(row) for row in [*person, stranger]}  # as targets
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
    rows = as_rows([*person, stranger])
    assert {
        PhotoVariant(rows[place], number) for place, number in zip(*variants_of(rows, count), strict=True)
    } == asked


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
    samples = Samples(index, rows, toy.config(tmp_path), TIMESTEPS, None, _small_heads)
    sample = samples.sample(0, 5)
    assert sample["crops"].shape == (3, 3, 112, 112)
    assert sample["heads"].shape == (2, 3, 32, 32)
    own, _ = photo_pictures(index.load(rows[5]), PhotoVariant(rows[5]))
    assert np.array_equal(levels(sample["crops"][-1]).round(), own)
    persons = [row for row in rows if row.identity == rows[5].identity and row is not rows[5]]
    theirs = [photo_pictures(index.load(row), PhotoVariant(row))[0] for row in persons]
    for crop in sample["crops"][:-1]:
        assert any(np.array_equal(levels(crop).round(), face) for face in theirs)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_person_can_be_known_by_another_photo(toy: Toy, tmp_path: Path, share: float) -> None:
    """The picture and its landmarks are the target's in any case."""
    index = read_index(toy.index)
    rows = index.usable("train")
    config = config_of(data={"resolution": 64, "other_photo": share}, adapter={"method": "uniid"})
    samples, plain = (
        Samples(index, rows, some, TIMESTEPS)
        for some in (config, config_of(data={"resolution": 64}, adapter={"method": "uniid"}))
    )
    persons = [row for row in rows if row.identity == rows[5].identity]
    faces = {row.number: photo_pictures(index.load(row), PhotoVariant(row))[0] for row in persons}
    seen = []
    for epoch in range(24):
        sample, own = samples.sample(epoch, 5), plain.sample(epoch, 5)
        assert {name for name in own if not _equal(own[name], sample[name])} <= {"crops"}
        crop = levels(sample["crops"][0]).round()
        seen += [number for number, face in faces.items() if np.array_equal(crop, face)]
    assert len(seen) == 24, "always this person"
    others = [number for number in seen if number != rows[5].number]
    assert {0.0: len(others) == 0, 0.5: 0 < len(others) < 24, 1.0: len(others) == 24}[share]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_target_can_be_among_the_references(toy: Toy, tmp_path: Path, share: float) -> None:
    """What else a sample has stays as it was."""
    index = read_index(toy.index)
    rows = index.usable("train")
    samples, plain = (
        Samples(index, rows, config_of(data={"resolution": 64, "references": 2, **more}), TIMESTEPS)
        for more in ({"own_photo": share}, {})
    )
    own, _ = photo_pictures(index.load(rows[5]), PhotoVariant(rows[5]))
    places: list[int] = []
    for epoch in range(24):
        sample, usual = samples.sample(epoch, 5), plain.sample(epoch, 5)
        assert {name for name in usual if not _equal(usual[name], sample[name])} <= {"crops", "heads"}
        assert torch.equal(sample["crops"][-1], usual["crops"][-1]), "the identity to match"
        shown = [np.array_equal(levels(crop).round(), own) for crop in sample["crops"][:-1]]
        assert sum(shown) <= 1
        places += [place for place, is_own in enumerate(shown) if is_own]
    assert {0.0: not places, 0.5: 0 < len(places) < 24, 1.0: len(places) == 24}[share]
    assert not places or set(places) == {0, 1}, "in any place"


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
