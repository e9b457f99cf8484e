"""Photos in the format of the face code: (H, W, 3) uint8 RGB."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

Image = NDArray[np.uint8]  # (H, W, 3), RGB, 0..255

MIN_SIDE = 32
MAX_SIDE = 32766  # OpenCV's warp addresses pixels with 16-bit integers
_MAX_FLOAT = 16.0  # above any highlight: the image must be in 0..255, and clamping would turn it white
_STRIP = 64  # rows converted at a time, to avoid a second full-size float copy of a large image


def check_image(image: np.ndarray | Tensor, index: int = 0, count: int = 1) -> Image:
    """Convert one photo, (H, W, C) with 1, 3 or 4 channels, to (H, W, 3) uint8 RGB.

    uint8 is in 0..255, floating point in 0..1 (values outside are clamped). Grey is repeated to three channels.
    A fourth channel is alpha: the photo is composited over white, so that transparent pixels stay hidden.

    `index` (from 0) and `count` identify the photo in errors. Raises InputError for any other shape or type, a side below
    32 px, and NaN or infinite values.
    """
    image = require_image(image, index, count)
    height, width, channels = image.shape
    if image.dtype == np.uint8 and channels == 3:
        return image
    result = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP):
        strip = image[top : top + _STRIP].astype(np.float32)
        if image.dtype == np.uint8:
            strip /= 255
        strip = strip.clip(0, 1)
        colors = strip[..., :3]
        if channels == 4:
            opacity = strip[..., 3:]
            colors = colors * opacity + (1 - opacity)
        result[top : top + _STRIP] = np.rint(colors * 255)
    return result


def crops_to_pixels(crops: Tensor) -> Image:
    """Convert recogniser inputs (F, 3, H, W), RGB in [-1, 1], to pictures (F, H, W, 3), RGB uint8."""
    levels = ((crops.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(1, -1).contiguous().numpy()


def require_image(image: np.ndarray | Tensor, index: int = 0, count: int = 1) -> np.ndarray:
    """Return a photo as an array if `check_image` accepts it, else raise its InputError. A CPU tensor is not copied."""
    name = f"image {index + 1} of {count}"
    if isinstance(image, Tensor):
        image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise InputError(
            f"{name}: expected one image (height, width, channels) with 1, 3 or 4 channels, got shape {image.shape}"
        )
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise InputError(
            f"{name} is {width}x{height}; both sides must be between {MIN_SIDE} and {MAX_SIDE} px. Use another size."
        )
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise InputError(f"{name} has values of type {image.dtype}; use uint8 (0..255) or floats (0..1)")
        _check_values(image, name)
    return image


def to_bgr_uint8(image: Image) -> NDArray[np.uint8]:
    """Convert an RGB photo (H, W, 3) to the BGR of insightface. No other code does this conversion."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"expected an RGB image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    return np.ascontiguousarray(image[..., ::-1])


@dataclass(frozen=True)
class Origin:
    """The user's file behind a photo, if the host knows it. Sizes are in pixels after EXIF rotation."""

    file: str
    width: int
    height: int

    def scale_to(self, image: Image) -> float:
        """Return pixels of the photo (H, W, 3) per pixel of the file, independent of any cropping to the photo's shape."""
        height, width = image.shape[:2]
        return max(float(width / self.width), float(height / self.height))

    def is_cropped(self, image: Image) -> bool:
        """Return whether a part of the file is missing in the photo (H, W, 3). Rounding by up to a pixel does not count."""
        scale = self.scale_to(image)
        height, width = image.shape[:2]
        return bool(self.width * scale - width > 1 or self.height * scale - height > 1)


def image_name(image: Image, index: int, count: int, origin: Origin | None = None) -> str:
    """Return the name of a photo for messages: "image 2 of 4 (768x1024)", width first.

    With its origin: "image 2 of 4 (anna.jpg, 3000x4000)", followed by any scaling or cropping.
    """
    height, width = image.shape[:2]
    facts = f"{width}x{height}"
    if origin is not None:
        facts = f"{origin.file}, {origin.width}x{origin.height}"
        if origin.is_cropped(image):
            facts += f", cropped to {width}x{height}"
        elif (width, height) != (origin.width, origin.height):
            facts += f", scaled to {width}x{height}"
    return f"image {index + 1} of {count} ({facts})"


def _check_values(image: np.ndarray, name: str) -> None:
    strips = [image[top : top + _STRIP] for top in range(0, image.shape[0], _STRIP)]
    broken = sum(int(np.count_nonzero(~np.isfinite(strip))) for strip in strips)
    if broken:
        share = broken / image.size
        raise InputError(
            f"{name} ({image.shape[1]}x{image.shape[0]}): {share:.1%} of its values are NaN or infinite. "
            "The node that made it failed, often a VAE in half precision; repair that first."
        )
    highest = max(float(strip.max()) for strip in strips)
    if highest > _MAX_FLOAT:
        raise InputError(
            f"{name} has values up to {highest:g}; floating point images must be in 0..1 (divide by 255)"
        )
