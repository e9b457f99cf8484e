"""More photos from few: what variants may change, and what they may not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from idadapter_core.errors import InputError
from idadapter_core.faces.detector import FaceAnalyzer, open_analyzer
from idadapter_core.faces.enrich import enrich
from idadapter_core.faces.features import extract_features
from idadapter_core.faces.images import Image
from tests.tiny.face_package import MarkedFace, synthesize, write_package

MANY = 16
NOTHING: dict[str, Any] = {"flip": False, "rotation": 0.0, "colour": 0.0}


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory: pytest.TempPathFactory) -> FaceAnalyzer:
    return open_analyzer(write_package(tmp_path_factory.mktemp("package")), "cpu", recognition=True)


def person(x: float = 320, size: float = 90) -> Image:
    return synthesize(faces=[MarkedFace(x, 300, size, identity=1)])


def noise(width: int = 60, height: int = 40, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(*color: int) -> Image:
    return np.full((40, 60, 3), color, np.uint8)


def variants(photo: Image, seed: int = 1, **changes: Any) -> list[Image]:
    """Of one photo, with these changes only."""
    return enrich([photo], MANY, seed, **{**NOTHING, **changes})[1:]


def assert_same(some: list[Image], others: list[Image]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_photos_come_first_and_unchanged() -> None:
    photos = [noise(seed=1), noise(50, 70, seed=2)]
    before = [photo.copy() for photo in photos]
    result = enrich(photos, 5, 7)
    assert len(result) == 5
    assert all(one is photo for one, photo in zip(result, photos, strict=False))
    assert_same(photos, before)
    for variant in result[2:]:
        assert variant.dtype == np.uint8
        assert variant.flags.c_contiguous
        assert not any(np.array_equal(variant, photo) for photo in photos)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_enough_photos_stay_as_they_are(count: int) -> None:
    photos = [noise(seed=seed) for seed in range(3)]
    assert_same(enrich(photos, count, 7), photos)


def test_variants_are_made_of_the_photos_in_turn() -> None:
    sizes = [photo.shape for photo in enrich([noise(60, 40), noise(50, 70), noise(33, 32)], 8, 0)]
    assert sizes == [(40, 60, 3), (70, 50, 3), (32, 33, 3)] * 2 + [(40, 60, 3), (70, 50, 3)]


def test_the_same_seed_gives_the_same_variants() -> None:
    assert_same(enrich([person()], 4, 5), enrich([person()], 4, 5))
    for one, other in zip(enrich([person()], 4, 5)[1:], enrich([person()], 4, 6)[1:], strict=True):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_asking_for_more_keeps_the_variants_that_were_there(seed: int) -> None:
    photos = [noise(seed=1), noise(seed=2)]
    more = enrich(photos, 9, seed)
    for count in range(2, 9):
        assert_same(enrich(photos, count, seed), more[:count])


def test_variants_of_one_photo_differ_from_each_other() -> None:
    seen = variants(noise(), flip=True, rotation=10, colour=0.15)
    for i, one in enumerate(seen):
        assert not any(np.array_equal(one, other) for other in seen[i + 1 :])


def test_without_any_change_the_photo_is_repeated() -> None:
    photo = noise()
    assert_same(variants(photo), [photo] * (MANY - 1))


def test_a_flip_is_the_exact_mirror_image_and_comes_by_chance() -> None:
    photo = noise()
    flipped = [np.array_equal(variant, photo[:, ::-1]) for variant in variants(photo, flip=True)]
    plain = [np.array_equal(variant, photo) for variant in variants(photo, flip=True)]
    assert [one != other for one, other in zip(flipped, plain, strict=True)] == [True] * (MANY - 1)
    assert 3 <= sum(flipped) <= MANY - 4


def test_what_is_switched_off_does_not_change_the_rest() -> None:
    photo = noise()
    mirrored = [not np.array_equal(variant, photo) for variant in variants(photo, flip=True)]
    coloured = variants(photo, colour=0.3)
    both = variants(photo, flip=True, colour=0.3)
    assert_same(
        both,
        [one[:, ::-1] if is_mirrored else one for one, is_mirrored in zip(coloured, mirrored, strict=True)],
    )


@pytest.mark.parametrize(("width", "height"), [(64, 64), (400, 32), (32, 300)])
def test_turning_leaves_no_empty_corners(width: int, height: int) -> None:
    photo = np.full((height, width, 3), (200, 100, 50), np.uint8)
    assert_same(variants(photo, rotation=45), [photo] * (MANY - 1))


def test_faces_are_turned_both_ways_and_within_the_limit(analyzer: FaceAnalyzer) -> None:
    angles = []
    for variant in variants(person(), rotation=20):
        (face,) = analyzer.detect(variant, 0, lambda: None)
        (x1, y1), (x2, y2) = face.landmarks[:2]
        angles.append(math.degrees(math.atan2(y2 - y1, x2 - x1)))
        # About the centre of the photo: the nose keeps its distance from there.
        x, y = face.landmarks[2]
        assert math.hypot(x - 319.5, y - 319.5) == pytest.approx(math.hypot(0.5, 19.5), abs=1.5)
    assert -21 < min(angles) < -10
    assert 10 < max(angles) < 21


@pytest.mark.parametrize("colour", [0.1, 0.4])
def test_brightness_changes_within_the_limit(colour: float) -> None:
    # A single grey has neither contrast nor saturation.
    levels = [variant[0, 0, 0] / 100 for variant in variants(flat(100, 100, 100), colour=colour)]
    assert 1 - colour - 0.01 <= min(levels) < 1 - colour / 2
    assert 1 + colour / 2 < max(levels) <= 1 + colour + 0.01


def test_contrast_changes_within_the_limit() -> None:
    photo = flat(80, 80, 80)
    photo[:20] = 120
    ratios = []
    for variant in variants(photo, colour=0.4):
        dark, light = float(variant[-1, 0, 0]), float(variant[0, 0, 0])
        ratios.append((light - dark) / (light + dark) / 0.2)
    assert 0.55 < min(ratios) < 0.8
    assert 1.2 < max(ratios) < 1.45


def test_saturation_changes_within_the_limit() -> None:
    photo = flat(130, 110, 110)
    photo[14:27], photo[27:] = 100, 140
    ratios = []
    for variant in variants(photo, colour=0.4):
        red, green, blue = (float(value) for value in variant[0, 0])
        assert green == blue
        # Brightness and contrast change the distance of the two greys by the same factors as the colour.
        greys = float(variant[-1, 0, 0]) - float(variant[20, 0, 0])
        ratios.append((red - green) / 20 / (greys / 40))
    assert 0.5 < min(ratios) < 0.8
    assert 1.2 < max(ratios) < 1.5


def test_variants_show_the_same_person(analyzer: FaceAnalyzer) -> None:
    """Not mirrored: the tiny detector knows the left eye by its colour."""
    stranger = synthesize(faces=[MarkedFace(320, 300, 90, identity=2, skin=(120, 130, 190))])
    photos = enrich([person(), person(250, 120)], 8, 0, flip=False, rotation=15, colour=0.08)
    features = extract_features([*photos, stranger], analyzer, None).features
    unit = torch.nn.functional.normalize(features.embedding, dim=1)
    cosines = unit @ unit[0]
    assert len(features) == 9
    assert cosines[:8].min() > 0.95
    assert cosines[8] < 0.5


def test_photos_of_other_forms_are_read_as_everywhere() -> None:
    photo = noise()
    result = enrich([torch.from_numpy(photo).float() / 255], 2, 3)
    assert_same(result, enrich([photo], 2, 3))


def test_no_photos() -> None:
    with pytest.raises(InputError, match="no photos were given to enrich; connect at least one"):
        enrich([], 4, 0)


def test_a_photo_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match="image 2 of 2 is 8x8"):
        enrich([noise(), noise(8, 8)], 4, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be at least 1, the number of photos to reach, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"rotation": -1.0}, "rotation must be between 0 and 45 degrees, got -1.0"),
        ({"rotation": 45.1}, "rotation must be between 0 and 45 degrees, got 45.1"),
        ({"rotation": math.nan}, "rotation must be between 0 and 45 degrees, got nan"),
        ({"colour": -0.1}, "colour must be between 0 and 0.9, a share of the original, got -0.1"),
        ({"colour": 1.0}, "colour must be between 0 and 0.9, a share of the original, got 1.0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        enrich([noise()], **{"count": 4, "seed": 0, **values})
