from __future__ import annotations

import numpy as np
import pytest
import torch

from idadapter_core.errors import InputError
from idadapter_core.faces.images import Origin, check_image, image_name, to_bgr_uint8

LEVELS = np.arange(256, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)  # (40, 256, 3)


def test_uint8_rgb_passes_untouched() -> None:
    assert check_image(LEVELS) is LEVELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_level_survives_floating_point(dtype: torch.dtype) -> None:
    image = torch.from_numpy(LEVELS.astype(np.float64) / 255).to(dtype)
    np.testing.assert_array_equal(check_image(image), LEVELS)


def test_bfloat16_is_read() -> None:
    image = torch.from_numpy(LEVELS.astype(np.float32) / 255).bfloat16()
    assert np.abs(check_image(image).astype(int) - LEVELS.astype(int)).max() <= 1


def test_values_slightly_outside_are_clamped() -> None:
    image = np.full((40, 40, 3), 1.02, np.float32)
    image[:, :20] = -0.01
    result = check_image(image)
    assert (result[:, 20:] == 255).all()
    assert (result[:, :20] == 0).all()


def test_grey_becomes_three_equal_channels() -> None:
    np.testing.assert_array_equal(check_image(LEVELS[..., :1]), LEVELS)
    np.testing.assert_array_equal(check_image(LEVELS[..., :1].astype(np.float32) / 255), LEVELS)


@pytest.mark.parametrize("scale", [1, 1 / 255])
def test_transparent_pixels_stay_hidden(scale: float) -> None:
    image = np.zeros((40, 40, 4), np.uint8)
    image[..., 0] = 200  # red everywhere,
    image[:, :20, 3] = 255  # visible on the left only
    given = image if scale == 1 else (image * scale).astype(np.float32)
    result = check_image(given)
    assert (result[:, :20] == [200, 0, 0]).all()
    assert (result[:, 20:] == 255).all()


def test_tall_images_are_converted_to_the_last_row() -> None:
    image = np.random.default_rng(0).random((1300, 33, 3)).astype(np.float32)
    np.testing.assert_array_equal(check_image(image), np.rint(image * 255).astype(np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    image = torch.zeros(64, 48, 3)
    image[:16] = bad
    with pytest.raises(InputError, match=r"image 2 of 4 \(48x64\): 25\.0% of its values are NaN or infinite"):
        check_image(image, 1, 4)


def test_float_image_in_the_wrong_range() -> None:
    with pytest.raises(InputError, match=r"values up to 255; floating point images must be in 0\.\.1"):
        check_image(LEVELS.astype(np.float32))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (500, 31), (31, 500)])
def test_too_small(width: int, height: int) -> None:
    with pytest.raises(
        InputError, match=rf"image 1 of 1 is {width}x{height}; both sides must be between 32 and"
    ):
        check_image(np.zeros((height, width, 3), np.uint8))


def test_too_long() -> None:
    with pytest.raises(InputError, match="both sides must be between 32 and 32766 px"):
        check_image(np.zeros((32, 40_000, 3), np.uint8))


@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64, 3), (3, 64, 64), (64, 64, 2)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected one image \(height, width, channels\)"):
        check_image(np.zeros(shape, np.uint8))


def test_other_types() -> None:
    with pytest.raises(InputError, match="values of type int64; use uint8"):
        check_image(torch.zeros(64, 64, 3, dtype=torch.int64))


def test_red_and_blue_change_places() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[..., 0] = 9
    bgr = to_bgr_uint8(image)
    assert bgr[0, 0].tolist() == [0, 0, 9]
    assert bgr.flags["C_CONTIGUOUS"]
    with pytest.raises(InputError, match="float32"):
        to_bgr_uint8(image.astype(np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("origin", "scale", "cropped", "facts"),
    [
        (Origin("anna.jpg", 60, 40), 1.0, False, "anna.jpg, 60x40"),
        (Origin("anna.jpg", 6000, 4000), 0.01, False, "anna.jpg, 6000x4000, scaled to 60x40"),
        (Origin("anna.jpg", 601, 400), 0.1, False, "anna.jpg, 601x400, scaled to 60x40"),
        (Origin("anna.jpg", 1200, 4000), 0.05, True, "anna.jpg, 1200x4000, cropped to 60x40"),
        (Origin("anna.jpg", 60, 80), 1.0, True, "anna.jpg, 60x80, cropped to 60x40"),
    ],
)
def test_a_photo_is_named_by_its_file(origin: Origin, scale: float, cropped: bool, facts: str) -> None:
    photo = np.zeros((40, 60, 3), np.uint8)
    assert origin.scale_to(photo) == pytest.approx(scale)
    assert origin.is_cropped(photo) is cropped
    assert image_name(photo, 1, 4, origin) == f"image 2 of 4 ({facts})"
    assert image_name(photo, 1, 4) == "image 2 of 4 (60x40)"
