"""Samples: pictures and landmarks that agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from idadapter_core.data.references import Photo, photo_pictures
from idadapter_core.errors import FaceError
from idadapter_core.faces.align import TEMPLATE, align_face
from idadapter_core.faces.enrich import variant
from idadapter_core.randomness import seed_of
from idadapter_core.training.samples import VALIDATION, Samples, place, target_picture
from tests.core.training.sampled import MIRRORED, SHOTS, TIMESTEPS, config_of, dots, draw, levels
from tests.tiny.face_package import MarkedFace


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
    crop, head = photo_pictures(index.load(row), Photo(row, number))
    assert crop.shape == (112, 112, 3)
    assert head.shape[0] == head.shape[1]
    if number:  # other light: look for the dot in what is left of its colour
        plain, _ = photo_pictures(index.load(row), Photo(row))
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
    plain, _ = photo_pictures(image, Photo(row))
    lost = []
    for number in range(1, 30):
        turned, points = variant(image, np.array(row.landmarks), seed_of(row.sha256), number)
        try:
            align_face(turned, tuple(map(tuple, points.tolist())))
        except FaceError:
            lost.append(number)
    assert 0 < len(lost) < 29
    for number in range(1, 30):
        crop, _ = photo_pictures(image, Photo(row, number))
        assert np.array_equal(crop, plain) == (number in lost)
