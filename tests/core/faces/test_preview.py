from __future__ import annotations

import numpy as np
import pytest

from idadapter_core.faces.preview import (
    CHOSEN_COLOR,
    OTHER_COLOR,
    SHOWN_PIXELS,
    draw_preview,
    face_mask,
    shown_size,
)
from idadapter_core.types import Face


def _face(x1: float, y1: float, x2: float, y2: float) -> Face:
    return Face((x1, y1, x2, y2), ((0.0, 0.0),) * 5, 0.87)


def _pixels(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (image == np.array(color)).all(axis=-1)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (640, 480), (7680, 4320)])
def test_boxes_and_labels_are_drawn_in_proportion(width: int, height: int) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    chosen = _face(0.1 * width, 0.3 * height, 0.4 * width, 0.7 * height)
    other = _face(0.6 * width, 0.3 * height, 0.9 * width, 0.7 * height)
    result = draw_preview(image, [chosen, other], [chosen])
    assert result.shape == image.shape
    assert (image == 90).all(), "the photo itself must stay as it is"
    left, right = result[:, : width // 2], result[:, width // 2 :]
    assert _pixels(left, CHOSEN_COLOR).any()
    assert not _pixels(left, OTHER_COLOR).any()
    assert _pixels(right, OTHER_COLOR).any()
    assert not _pixels(right, CHOSEN_COLOR).any()
    assert _pixels(left, CHOSEN_COLOR).sum() > 2 * _pixels(right, OTHER_COLOR).sum(), (
        "the chosen one stands out"
    )
    # The filled label above the chosen box is high enough to read: 3 % of the picture, at least 10 px.
    label_rows = _pixels(left[: int(0.29 * height)], CHOSEN_COLOR).any(axis=1).sum()
    assert label_rows >= max(10, 0.03 * min(width, height))
    assert label_rows <= 0.15 * height


def test_numbers_differ() -> None:
    image = np.full((256, 256, 3), 90, np.uint8)
    face = _face(60, 100, 200, 220)
    first = draw_preview(image, [face], [face])
    second = draw_preview(image, [_face(-900, -900, -800, -800), face], [face])
    assert (first[70:100] != second[70:100]).any()


def test_labels_stay_inside_for_faces_beyond_the_edge() -> None:
    image = np.full((256, 256, 3), 90, np.uint8)
    for box in ((-300, -300, 400, 500), (200, -50, 500, 60), (-50, 240, 20, 400)):
        face = _face(*box)
        assert _pixels(draw_preview(image, [face], [face]), CHOSEN_COLOR).sum() > 100


def test_nobody_found_leaves_the_photo() -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    np.testing.assert_array_equal(draw_preview(image, [], []), image)


def test_mask_covers_the_boxes() -> None:
    mask = face_mask([_face(2, 1, 5, 4), _face(-5, 6, 3, 99)], 8, 10)
    assert mask.shape == (8, 10)
    assert mask.dtype.is_floating_point
    assert mask.sum() == 3 * 3 + 3 * 2
    assert mask[1:4, 2:5].eq(1).all()
    assert mask[6:, :3].eq(1).all()
    assert face_mask([], 8, 10).sum() == 0


def test_mask_of_a_face_outside_is_empty() -> None:
    assert face_mask([_face(-30, -30, -10, -10), _face(50, 50, 60, 60)], 8, 10).sum() == 0


def test_sizes_that_are_shown() -> None:
    assert shown_size(16, 4320, 7680) == (4320, 7680), "few photos are shown as they are"
    assert shown_size(200, 64, 64) == (64, 64), "small ones, too"
    height, width = shown_size(200, 720, 1280)
    assert 200 * height * width == pytest.approx(SHOWN_PIXELS, rel=0.01)
    assert width / height == pytest.approx(1280 / 720, rel=0.01)
    assert shown_size(5000, 720, 1280) == (180, 320)
    assert shown_size(10**6, 32, 32000) == (8, 8000)


def test_a_small_mask_still_shows_a_small_box() -> None:
    mask = face_mask([_face(100, 200, 101, 201)], 720, 1280, (72, 128))
    assert mask.shape == (72, 128)
    assert mask.sum() == mask[20, 10] == 1
