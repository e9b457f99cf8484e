"""Augmentation of a few photos of a person by changes that preserve the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage, ImageEnhance
from torch import Tensor

from ..errors import InputError
from .images import Image, check_image

MAX_ROTATION = 45.0  # degrees; beyond it detectors lose the face
MAX_COLOUR = 0.9  # fraction of the original; at 1 a photo can turn black
ROTATION = 10.0  # degrees, the default
COLOUR = 0.15  # fraction of the original, the default
_MIRRORED_ORDER = [1, 0, 2, 4, 3]  # insightface's five landmarks in a mirrored photo
_MARGIN = 2  # pixels that bicubic interpolation reads beyond the border
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def enrich(
    images: Sequence[Image | Tensor],
    count: int,
    seed: int,
    *,
    flip: bool = True,
    rotation: float = ROTATION,
    colour: float = COLOUR,
) -> list[Image]:
    """Extend K photos (H, W, 3), RGB uint8, to max(K, count): the photos themselves, then variants of them in turn.

    A variant has the size of its photo. It is flipped with probability 1/2 (`flip`), rotated by up to `rotation` degrees either
    way, with the photo reflected at its borders, and its brightness, contrast and saturation each change by up to the fraction
    `colour`. Variant v depends only on its photo, `seed` and v: a larger count keeps the first variants, and switching one change
    off does not affect the others.

    The photos may differ in size and are not modified; uint8 RGB arrays are returned as the same objects.

    Source: IDAdapter (arXiv 2403.13535) learns from several photos of each person and augments them by flips, rotations and
    colour changes. The amounts are ours.

    Raises:
        InputError: no photos, one that is not an image, or a value out of range: count at least 1, seed at least 0, rotation
            0..45, colour 0..0.9.
    """
    if not images:
        raise InputError("no photos were given to enrich; connect at least one photo of the person")
    if count < 1:
        raise InputError(f"count must be at least 1, the number of photos to reach, got {count}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if not 0 <= rotation <= MAX_ROTATION:
        raise InputError(f"rotation must be between 0 and {MAX_ROTATION:g} degrees, got {rotation}")
    if not 0 <= colour <= MAX_COLOUR:
        raise InputError(
            f"colour must be between 0 and {MAX_COLOUR:g}, a share of the original, got {colour}"
        )
    photos = [check_image(image, index, len(images)) for index, image in enumerate(images)]
    variants = [
        _apply(
            photos[number % len(photos)],
            _draw(np.random.default_rng([seed, number]), flip, rotation, colour),
        )
        for number in range(count - len(photos))
    ]
    return photos + variants


def variant(
    photo: Image, points: NDArray[np.floating], seed: int, number: int
) -> tuple[Image, NDArray[np.float64]]:
    """Return a variant of a photo (H, W, 3), RGB uint8, with the default amounts of change, and the new positions of points (P, 2).

    Args:
        points: in pixels, with pixel centres at integers. The first five are a face's landmarks in insightface's order, whose
            left and right are swapped in a flipped photo; further points only move.
        number: number of the variant; each number gives another variant.
    """
    change = _draw(np.random.default_rng([seed, number]), True, ROTATION, COLOUR)
    height, width = photo.shape[:2]
    moved = np.array(points, dtype=np.float64)
    if change.mirrored:
        moved[:, 0] = width - 1 - moved[:, 0]
        moved[:5] = moved[_MIRRORED_ORDER]
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    sine, cosine = math.sin(math.radians(change.angle)), math.cos(math.radians(change.angle))
    turned = (moved - center) @ np.array([[cosine, -sine], [sine, cosine]]) + center
    return _apply(photo, change), turned


class _Change(NamedTuple):
    mirrored: bool
    angle: float  # degrees, counter-clockwise
    factors: tuple[float, ...]  # one for each of _ENHANCERS


def _draw(random: np.random.Generator, flip: bool, rotation: float, colour: float) -> _Change:
    # Always draw every value, so that switching one change off does not affect the others.
    mirrored = random.random() < 0.5
    angle = random.uniform(-1, 1) * rotation
    factors = 1 + random.uniform(-1, 1, len(_ENHANCERS)) * colour
    return _Change(flip and mirrored, angle, tuple(float(factor) for factor in factors))


def _apply(photo: Image, change: _Change) -> Image:
    if change.mirrored:
        photo = np.ascontiguousarray(photo[:, ::-1])
    picture = PILImage.fromarray(_turn(photo, change.angle) if change.angle else photo)
    for enhancer, factor in zip(_ENHANCERS, change.factors, strict=True):
        picture = enhancer(picture).enhance(factor)
    return np.array(picture, dtype=np.uint8)


def _turn(photo: Image, angle: float) -> Image:
    """Rotate counter-clockwise about the centre at the same size; corners are filled by reflection at the border."""
    height, width = photo.shape[:2]
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    # Padding on each side: half of the excess of the rotated frame over the photo.
    across = max(0, math.ceil((width * cosine + height * sine - width) / 2)) + _MARGIN
    down = max(0, math.ceil((height * cosine + width * sine - height) / 2)) + _MARGIN
    wide = np.pad(photo, ((down, down), (across, across), (0, 0)), mode="symmetric")
    turned = PILImage.fromarray(wide).rotate(angle, resample=PILImage.Resampling.BICUBIC)
    return np.array(turned, dtype=np.uint8)[down : down + height, across : across + width]
