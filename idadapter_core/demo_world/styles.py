"""Styles of pictures: photo, sketch, oil painting, comic, night."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import Floats, blur, box_mean, mix, slope, smear, smoothstep
from .noise import blotches, grain, look_up

GRAY = np.array([0.30, 0.59, 0.11], np.float32)


@dataclass(frozen=True, eq=False)
class Sheet:
    """The input of a style: a picture in samples, before they are averaged to pixels."""

    image: Floats  # (size, size, 3), display values 0..1
    depth: Floats  # (size, size), decimetres; larger is nearer
    kind: npt.NDArray[np.uint8]  # (size, size), constants of canvas.py
    seed: int
    scale: float  # samples of the sheet per sample of a picture of 128 pixels

    @property
    def gray(self) -> Floats:
        image = self.image * GRAY
        return image[..., 0] + image[..., 1] + image[..., 2]

    def lines(self) -> Floats:
        """Strength of outlines (size, size), 0..1.5: edges of the depth, and borders between kinds."""
        border = np.zeros(self.kind.shape, bool)
        border[1:] |= self.kind[1:] != self.kind[:-1]
        border[:, 1:] |= self.kind[:, 1:] != self.kind[:, :-1]
        edges = slope(blur(np.clip(self.depth, -3, 3), 0.6 * self.scale))
        return np.clip(0.55 * edges, 0, 1) + 0.5 * border

    def grid(self) -> tuple[Floats, Floats]:
        """Return x (1, size) and y (size, 1) of the samples, scaled to 0..256 as in a picture of 128 pixels."""
        places = np.arange(len(self.image), dtype=np.float32) / np.float32(self.scale)
        return places[None], places[:, None]


def finish(style: str, sheet: Sheet) -> Floats:
    """Apply a style to a picture. Returns display values (size, size, 3), 0..1."""
    return np.clip(STYLES[style](sheet), 0, 1)


def _photo(sheet: Sheet) -> Floats:
    return sheet.image


def _sketch(sheet: Sheet) -> Floats:
    """Pencil: hatching in the shade, lines at the edges."""
    gray = sheet.gray
    x, y = sheet.grid()
    around = blur(1 - gray, 9 * sheet.scale)
    shape = np.clip(gray / (1.03 - around), 0, 1)
    wobble = 3 * look_up(blotches(), x / 120 + 0 * y, y / 120 + 0 * x)
    hatch = 0.5 + 0.5 * np.sin((x + y) * 0.95 + wobble)
    cross = 0.5 + 0.5 * np.sin((x - y) * 0.95 + wobble)
    fine = np.clip(slope(blur(gray, 0.8 * sheet.scale)) - 0.06, 0, 1)
    tone = (
        shape
        - 0.40 * np.clip(0.62 - gray, 0, 1) * (0.5 + hatch)
        - 0.30 * np.clip(0.3 - gray, 0, 1) * (0.4 + cross)
    )
    tone = tone - 0.45 * np.clip(blur(sheet.lines(), 0.7 * sheet.scale), 0, 1) - 0.6 * fine
    paper = 0.96 + 0.05 * (look_up(grain(), x / 256 + 0 * y, y / 256 + 0 * x) - 0.5)
    return (np.clip(tone, 0.08, 1) * paper)[..., None] * np.array([1, 0.985, 0.95], np.float32)


def _flattened(sheet: Sheet, reach: int) -> Floats:
    """Kuwahara filter (size, size, 3): a sample becomes the mean of the one of four squares around it with the least variance."""
    gray, width = sheet.gray, 2 * (reach // 2) + 1
    means = box_mean(sheet.image, width)
    mean = box_mean(gray, width)
    spread = box_mean(gray * gray, width) - mean * mean
    n, step = len(gray), max(1, reach // 2)
    places = np.arange(n)
    calmest = np.full(gray.shape, np.inf, np.float32)
    found = means
    for dy in (-step, step):
        for dx in (-step, step):
            rows, columns = np.clip(places + dy, 0, n - 1)[:, None], np.clip(places + dx, 0, n - 1)[None]
            here = spread[rows, columns]
            better = here < calmest
            calmest = np.where(better, here, calmest)
            found = np.where(better[..., None], means[rows, columns], found)
    return found


def _saturated(image: Floats, amount: float) -> Floats:
    mean = (image[..., 0] + image[..., 1] + image[..., 2])[..., None] / 3
    return mean + (image - mean) * np.float32(amount)


def _oil(sheet: Sheet) -> Floats:
    """Brush strokes in warm, saturated colours."""
    flat = mix(
        _flattened(sheet, max(2, round(4 * sheet.scale))), sheet.image, 0.3
    )  # keeps the eyes recognisable
    flat = np.clip((_saturated(flat, 1.4) - 0.5) * 1.1 + 0.53, 0, 1)
    rng = np.random.default_rng([SEED_TAG, sheet.seed])
    size = len(flat)
    white = blur(rng.standard_normal((size, size)).astype(np.float32), 0.7 * sheet.scale)
    x, y = sheet.grid()
    upright = look_up(blotches(), x / 256 + 0 * y + float(rng.random()), y / 256 + 0 * x) > 0.5
    reach = 3.5 * sheet.scale
    strokes = np.where(upright, smear(white, reach, 0), smear(white, reach, 1)) * np.float32(
        0.9 * sheet.scale
    )
    return flat * (1 + 0.16 * strokes)[..., None] * np.array([1.03, 1.0, 0.92], np.float32)


def _comic(sheet: Sheet) -> Floats:
    """Flat colours in a few steps, and ink lines."""
    flat = mix(_flattened(sheet, max(2, round(4 * sheet.scale))), sheet.image, 0.35)
    mean = (flat[..., 0] + flat[..., 1] + flat[..., 2])[..., None] / 3
    level = mean * 5 + 0.3
    whole = np.floor(level)
    stepped = (
        whole + smoothstep(0.42, 0.58, level - whole) - 0.05
    ) / 5  # narrow ramps between the steps instead of jumps
    flat = np.clip(_saturated(flat, 1.5) * stepped / (mean + 0.02) * 1.12, 0, 1)
    detail = np.clip(slope(blur(sheet.gray, 1.0 * sheet.scale)) * sheet.scale - 0.20, 0, 1) * 1.5
    lines = blur(sheet.lines(), 0.8 * sheet.scale)
    ink = np.clip(1.5 * lines + detail, 0, 1)
    return flat * (1 - 0.9 * ink)[..., None]


def _night(sheet: Sheet) -> Floats:
    """Moonlight from above, and a warm lamp that lights the person from below."""
    x, y = sheet.grid()
    x, y = x / 256, y / 256
    gray = sheet.gray[..., None]
    lifted = np.sqrt(mix(gray * sheet.image, sheet.image, 0.55))  # shadows and dark skin stay readable
    moon = mix(sheet.image, lifted, 0.55) * mix(np.float32(1.0) + 0 * gray, gray + 0.35, 0.5)
    behind = np.where(sheet.kind > 0, np.float32(1.0), np.float32(0.72))[..., None]
    moon = moon * behind * np.array([0.50, 0.64, 1.0], np.float32) + np.array([0.015, 0.02, 0.07], np.float32)
    warm = (np.clip(y * 1.5 - 0.5, 0, 1) * (sheet.kind > 0))[..., None] * np.float32(0.4)
    dark = (1.08 - 0.55 * np.sqrt((x - 0.5) ** 2 + (y - 0.45) ** 2))[..., None]
    return moon * dark + warm * lifted * np.array([1.0, 0.62, 0.28], np.float32)


SEED_TAG = 1_208  # separates this random stream, as in identity.py

STYLES: Mapping[str, Callable[[Sheet], Floats]] = {
    "photo": _photo,
    "sketch": _sketch,
    "oil": _oil,
    "comic": _comic,
    "night": _night,
}
