from __future__ import annotations

import numpy as np
import pytest
import torch

from idadapter_core.faces.preview import (
    CHOSEN_COLOR,
    GIVEN_PIXELS,
    LEFT_OUT_COLOR,
    OTHER_COLOR,
    crop_sheet,
    draw_preview,
    face_mask,
    preview_size,
    small_preview,
    worth_showing,
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


def test_sizes_that_are_given_out() -> None:
    assert preview_size(16, 4320, 7680) == (4320, 7680), "few photos stay as they are"
    assert preview_size(200, 64, 64) == (64, 64), "small ones, too"
    height, width = preview_size(200, 720, 1280)
    assert 200 * height * width == pytest.approx(GIVEN_PIXELS, rel=0.01)
    assert width / height == pytest.approx(1280 / 720, rel=0.01)
    assert preview_size(5000, 720, 1280) == (180, 320)
    assert preview_size(10**6, 32, 32000) == (8, 8000)


def test_a_small_mask_still_shows_a_small_box() -> None:
    mask = face_mask([_face(100, 200, 101, 201)], 720, 1280, (72, 128))
    assert mask.shape == (72, 128)
    assert mask.sum() == mask[20, 10] == 1


@pytest.mark.parametrize(("width", "height"), [(200, 100), (768, 512), (3840, 2160), (1000, 4000)])
def test_a_small_preview_shows_the_same_boxes(width: int, height: int) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    chosen = _face(0.1 * width, 0.4 * height, 0.4 * width, 0.7 * height)
    other = _face(0.6 * width, 0.4 * height, 0.9 * width, 0.7 * height)
    result = small_preview(image, [other, chosen], [chosen])
    assert max(result.shape[:2]) == min(768, max(width, height))
    assert result.shape[1] / result.shape[0] == pytest.approx(width / height, rel=0.01)
    rows, columns = np.nonzero(_pixels(result, CHOSEN_COLOR))
    assert columns.max() / result.shape[1] == pytest.approx(0.4, abs=0.01)
    assert rows.max() / result.shape[0] == pytest.approx(0.7, abs=0.015)
    assert _pixels(result[:, result.shape[1] // 2 :], OTHER_COLOR).any()
    assert not _pixels(result, LEFT_OUT_COLOR).any()
    assert (image == 90).all(), "the photo itself must stay as it is"


@pytest.mark.parametrize("found", [[], [_face(20, 30, 60, 80)]])
def test_a_photo_that_was_left_out_has_a_red_frame(found: list[Face]) -> None:
    result = small_preview(np.full((120, 160, 3), 90, np.uint8), found, [])
    red = _pixels(result, LEFT_OUT_COLOR)
    assert red[0].all()
    assert red[-1].all()
    assert red[:, 0].all()
    assert red[:, -1].all()
    assert not red[10:60, 10:150].any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_the_faces_of_a_mix_are_framed_in_one_picture(count: int) -> None:
    """The last one was left out. Each crop has a grey of its own, by which its place is found again."""
    greys = torch.linspace(-0.9, 0.9, count)
    crops = greys[:, None, None, None].expand(-1, 3, 112, 112)
    result = crop_sheet(crops, [f"photo {i + 1}" for i in range(count)], [count - 1])
    assert max(result.shape[:2]) <= 768
    for i, grey in enumerate(((greys + 1) * 127.5).round().int().tolist()):
        rows, columns = np.nonzero((result == grey).all(axis=-1))
        row, column = int(rows.min()), int(columns.min())
        frame = tuple(result[row - 1, column].tolist())
        assert frame == (LEFT_OUT_COLOR if i == count - 1 else CHOSEN_COLOR)
        assert rows.max() - rows.min() > 150


def test_of_many_pictures_the_important_ones_are_shown() -> None:
    assert worth_showing(3, {1}) == [0, 1, 2]
    assert worth_showing(100, {50, 99}) == [0, 1, 2, 3, 4, 5, 50, 99]
    assert worth_showing(100, range(90, 100)) == list(range(90, 98))
