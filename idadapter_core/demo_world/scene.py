"""Paints backgrounds, slightly out of focus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .arrays import Color, Floats, blur, linear, mix, smoothstep
from .identity import between
from .noise import blotches, look_up


@dataclass(eq=False)
class Painting:
    """A square picture of display values, with coordinates 0..1 from the upper left corner."""

    image: Floats  # (size, size, 3)
    x: Floats  # (1, size)
    y: Floats  # (size, 1)

    @classmethod
    def blank(cls, size: int) -> Painting:
        places = ((np.arange(size) + 0.5) / size).astype(np.float32)
        return cls(np.zeros((size, size, 3), np.float32), places[None], places[:, None])

    @property
    def size(self) -> int:
        return len(self.image)

    def lay(
        self, color: Floats | Color, cover: Floats | float, at: tuple[slice, slice] | None = None
    ) -> None:
        """Blend a colour over the picture, or over a window of it. `cover` is the opacity, 0..1: a number or an array (h, w)."""
        window = self.image[at] if at else self.image
        share = np.asarray(cover, np.float32)
        window[...] = mix(window, color, share[..., None] if share.ndim else share)

    def disc(
        self, x: float, y: float, radius: float, color: Color, opacity: float = 1.0, soft: float = 0.012
    ) -> None:
        at = self._window(x - radius - soft, y - radius - soft, x + radius + soft, y + radius + soft)
        away = np.sqrt((self.x[:, at[1]] - x) ** 2 + (self.y[at[0]] - y) ** 2)
        self.lay(color, opacity * smoothstep(radius + soft, radius - soft, away), at)

    def box(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        color: Color,
        opacity: float = 1.0,
        soft: float = 0.006,
    ) -> None:
        at = self._window(x0 - soft, y0 - soft, x1 + soft, y1 + soft)
        x, y = self.x[:, at[1]], self.y[at[0]]
        inside = np.minimum(np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y))
        self.lay(color, opacity * smoothstep(-soft, soft, inside), at)

    def stroke(
        self, x0: float, y0: float, x1: float, y1: float, width: float, color: Color, soft: float = 0.01
    ) -> None:
        reach = width + soft
        at = self._window(min(x0, x1) - reach, min(y0, y1) - reach, max(x0, x1) + reach, max(y0, y1) + reach)
        dx, dy = x1 - x0, y1 - y0
        x, y = self.x[:, at[1]] - x0, self.y[at[0]] - y0
        along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
        away = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2)
        self.lay(color, smoothstep(width + soft, width - soft, away), at)

    def _window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        n = self.size
        left, top = (min(max(int(np.floor(v * n)), 0), n) for v in (x0, y0))
        right, bottom = (min(max(int(np.ceil(v * n)), 0), n) for v in (x1, y1))
        return slice(top, max(top, bottom)), slice(left, max(left, right))

    def noise(self, periods: float, rng: np.random.Generator) -> Floats:
        """Return soft noise (size, size) in 0..1, with `periods` periods along a side and a random offset."""
        across, along = float(rng.random()), float(rng.random())
        full = np.broadcast_arrays(self.y, self.x)
        return look_up(blotches(), full[0] * periods + across, full[1] * periods + along)


def background(name: str, seed: int, size: int) -> Floats:
    """Return a background (size, size, 3) in linear light. A seed always gives the same scene."""
    painting = Painting.blank(size)
    PAINTERS[name](painting, np.random.default_rng([SEED_TAG, seed]))
    return linear(np.clip(painting.image, 0, 1))


SEED_TAG = 1_207  # separates this random stream, as in identity.py


def _landscape(
    painting: Painting, rng: np.random.Generator, top: Color, horizon: Color, near: Color, far: Color
) -> float:
    """Paint sky and ground. Returns the y coordinate of the horizon."""
    level = between(rng, 0.42, 0.56)
    sky = mix(np.array(top, np.float32), horizon, np.clip(painting.y / level, 0, 1)[..., None])
    ground = mix(
        np.array(near, np.float32), far, np.clip((painting.y - level) / (1 - level) * 1.6, 0, 1)[..., None]
    )
    edge = smoothstep(level - 0.008, level + 0.008, painting.y)[..., None]
    painting.image[...] = mix(sky, ground, edge) * (0.94 + 0.12 * painting.noise(1, rng))[..., None]
    return level


def _studio(painting: Painting, rng: np.random.Generator) -> None:
    hue, value, strength = float(rng.random()), between(rng, 0.42, 0.78), between(rng, 0.06, 0.3)
    phase = 2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3]))
    color = (value * (1 + strength * np.cos(phase))).astype(np.float32)
    away = np.sqrt((painting.x - 0.5) ** 2 + (painting.y - 0.4) ** 2)
    painting.image[...] = color * (1.1 - 0.5 * away)[..., None]


def _snow(painting: Painting, rng: np.random.Generator) -> None:
    level = _landscape(
        painting, rng, (0.60, 0.73, 0.90), (0.88, 0.92, 0.97), (0.93, 0.95, 1.0), (0.80, 0.86, 0.95)
    )
    for _ in range(8):
        x, height, foot = float(rng.random()), between(rng, 0.14, 0.34), level + between(rng, 0.0, 0.09)
        _fir(painting, x, foot, height)
    for _ in range(60):
        painting.disc(
            float(rng.random()), float(rng.random()), between(rng, 0.004, 0.012), (1, 1, 1), 0.85, 0.005
        )


def _fir(painting: Painting, x: float, foot: float, height: float) -> None:
    for part in range(4):
        y, reach = foot - height * (0.12 + 0.2 * part), height * (0.27 - 0.055 * part)
        window = painting._window(x - reach, y - 0.3 * height, x + reach, y)
        down = (painting.y[window[0]] - (y - 0.3 * height)) / (0.3 * height)
        inside = reach * down - np.abs(painting.x[:, window[1]] - x)
        painting.lay(
            (0.24 + 0.04 * part, 0.37 + 0.04 * part, 0.38 + 0.04 * part),
            smoothstep(-0.004, 0.008, inside),
            window,
        )


def _beach(painting: Painting, rng: np.random.Generator) -> None:
    level = _landscape(
        painting, rng, (0.28, 0.58, 0.90), (0.76, 0.89, 0.97), (0.10, 0.50, 0.66), (0.20, 0.66, 0.74)
    )
    shore = level + between(rng, 0.14, 0.24)
    wave = shore + 0.012 * np.sin(painting.x * 9 + 6 * float(rng.random()))
    painting.lay((0.93, 0.85, 0.64), smoothstep(-0.006, 0.006, painting.y - wave))
    painting.lay((0.97, 0.98, 0.98), 0.8 * smoothstep(0.014, 0.0, np.abs(painting.y - wave)))
    for _ in range(1 + int(rng.random() * 2)):
        x, lean, y = float(rng.random()), between(rng, -0.08, 0.08), between(rng, 0.16, 0.3)
        painting.stroke(x, 0.8, x + lean, y, 0.014, (0.45, 0.34, 0.22))
        for k in range(8):
            turn = np.pi * (k / 7 * 1.3 - 0.15)
            dx, dy = 0.17 * float(np.cos(turn)), -0.09 * float(np.sin(turn)) + 0.03
            painting.stroke(x + lean, y, x + lean + dx, y + dy, 0.012, (0.17, 0.45, 0.22))


def _sunset(painting: Painting, rng: np.random.Generator) -> None:
    level = _landscape(
        painting, rng, (0.30, 0.24, 0.50), (1.0, 0.60, 0.28), (0.40, 0.24, 0.30), (0.18, 0.13, 0.20)
    )
    x = between(rng, 0.1, 0.9)
    away = (painting.x - x) ** 2 + (painting.y - level + 0.05) ** 2
    painting.image += 0.7 * np.exp(-away * 40)[..., None] * np.array([1.0, 0.7, 0.3], np.float32)
    painting.disc(x, level - 0.05, 0.045, (1.0, 0.93, 0.72), 0.95)
    ripple = smoothstep(0.3, 1.0, np.sin(painting.y * 130 + 4 * painting.noise(2, rng)))
    glitter = ripple * np.exp(-(((painting.x - x) / 0.09) ** 2)) * smoothstep(level, level + 0.02, painting.y)
    painting.lay((1.0, 0.70, 0.40), 0.7 * glitter)


def _forest(painting: Painting, rng: np.random.Generator) -> None:
    light = painting.noise(3, rng) ** 2 * (1.4 - painting.y)
    painting.image[...] = np.array([0.15, 0.27, 0.12], np.float32) + light[..., None] * np.array(
        [0.38, 0.54, 0.22], np.float32
    )
    for _ in range(9):
        x, width, tone = float(rng.random()), between(rng, 0.01, 0.045), between(rng, 0.13, 0.34)
        painting.box(x - width, -0.1, x + width, 1.1, (tone + 0.07, tone, tone - 0.06), 1, 0.012)
    for _ in range(36):
        tone = between(rng, 0.6, 1.5)
        color = (0.47 * tone, 0.66 * tone, 0.25 * tone)
        painting.disc(float(rng.random()), between(rng, 0, 0.8), between(rng, 0.01, 0.04), color, 0.75, 0.02)


def _city_night(painting: Painting, rng: np.random.Generator) -> None:
    painting.image[...] = np.array([0.06, 0.06, 0.16], np.float32) + painting.y[..., None] * np.array(
        [0.20, 0.11, 0.25], np.float32
    )
    for _ in range(11):
        x, width, top, tone = (
            between(rng, -0.1, 1),
            between(rng, 0.09, 0.2),
            between(rng, 0.12, 0.7),
            between(rng, 0.06, 0.17),
        )
        painting.box(x, top, x + width, 1.1, (tone, tone, tone + 0.07))
        for i in range(4):
            for j in range(int((1 - top) / 0.055)):
                if rng.random() < 0.38:
                    left, upper = x + (i + 0.25) * width / 4, top + 0.02 + j * 0.055
                    painting.box(left, upper, left + width / 8, upper + 0.026, (1.0, 0.82, 0.46), 0.9)
    colors: tuple[Color, ...] = ((1, 0.36, 0.28), (1, 0.8, 0.36), (0.36, 0.72, 1), (0.95, 0.36, 0.86))
    for _ in range(22):
        color = colors[int(rng.random() * 4)]
        painting.disc(float(rng.random()), between(rng, 0.35, 1), between(rng, 0.015, 0.05), color, 0.5)
    painting.image[...] = blur(painting.image, painting.size / 160)


def _brick(painting: Painting, rng: np.random.Generator) -> None:
    height, width = 1 / 13, 2.3 / 13
    y = painting.y / height + float(rng.random())
    row = np.floor(y)
    x = painting.x / width + 0.5 * (row % 2) + float(rng.random())
    tint = rng.random((16, 16)).astype(np.float32)[
        row.astype(np.int64) % 16, np.floor(x).astype(np.int64) % 16
    ]
    color = (
        np.array([0.58, 0.29, 0.22], np.float32)
        * (0.78 + 0.24 * tint + 0.2 * painting.noise(4, rng))[..., None]
    )
    joint = np.minimum(np.minimum(x % 1, 1 - x % 1) * width, np.minimum(y % 1, 1 - y % 1) * height)
    painting.image[...] = mix(color, (0.68, 0.62, 0.57), smoothstep(0.010, 0.004, joint)[..., None])


def _bookshelf(painting: Painting, rng: np.random.Generator) -> None:
    painting.image[...] = np.array([0.20, 0.13, 0.09], np.float32)
    for shelf in range(5):
        board, x = (shelf + 1) / 5 - 0.022, -0.02
        while x < 1:
            width, height, gray = (
                between(rng, 0.025, 0.05),
                between(rng, 0.11, 0.165),
                between(rng, 0.2, 0.62),
            )
            red, green, blue = (gray + 0.55 * (between(rng, 0, 1) - 0.5) for _ in range(3))
            painting.box(
                x,
                board - height,
                x + width - 0.004,
                board,
                (max(red, 0.06), max(green, 0.06), max(blue, 0.06)),
            )
            x += width
        painting.box(-0.1, board, 1.1, board + 0.022, (0.44, 0.29, 0.18))
    painting.image[...] = blur(painting.image, painting.size / 160)


PAINTERS: Mapping[str, Callable[[Painting, np.random.Generator], None]] = {
    "studio": _studio,
    "snow": _snow,
    "beach": _beach,
    "forest": _forest,
    "city_night": _city_night,
    "brick": _brick,
    "bookshelf": _bookshelf,
    "sunset": _sunset,
}
