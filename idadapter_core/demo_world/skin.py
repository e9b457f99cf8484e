"""The texture of the skin: a map around the head, in canonical coordinates."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .arrays import Floats, linear, mix, smoothstep
from .head import AXIS, above_hairline, inside_beard
from .identity import Brows, Person
from .noise import blotches, grain, look_up, strands

WIDTH, HEIGHT = 640, 352  # texels, slightly narrower than the samples of a picture of 128 pixels
BOTTOM, TOP = 5.9, 8.6  # heights of the template that the map spans
RADIUS = 1.08  # of the cylinder, in decimetres
BROW_BRIGHTNESS = 0.45  # upper limit: the brows of fair people are darker than their hair
BROW_LINE = 7.455  # height of the template

# Skin from light to dark, display values. `Look.tone` interpolates between them.
TONES = (
    np.array(
        [[244, 205, 184], [236, 188, 160], [219, 165, 130], [191, 136, 100], [147, 98, 69], [108, 70, 50], [80, 52, 39]],
        np.float32,
    )
    / 255
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SkinMap:
    """The painted skin of a person."""

    colors: Floats  # (HEIGHT, WIDTH, 3), linear light
    base: Floats  # (3,) the plain skin, linear light

    def __call__(self, places: Floats) -> Floats:
        """Return the light of the skin (M, 3) at canonical coordinates (M, 3), interpolated between texels."""
        turn = np.degrees(np.arctan2(places[:, 0], places[:, 2] - np.float32(AXIS)))
        column = (turn + 180) * np.float32(WIDTH / 360) - np.float32(0.5)
        row = np.clip(
            (TOP - places[:, 1]) * np.float32(HEIGHT / (TOP - BOTTOM)) - np.float32(0.5), 0, HEIGHT - 1.01
        )
        left, upper = np.floor(column), np.floor(row)
        across, down = (column - left)[:, None], (row - upper)[:, None]
        first, top = left.astype(np.int64) % WIDTH, upper.astype(np.int64) * WIDTH
        second, flat = (first + 1) % WIDTH, self.colors.reshape(-1, 3)
        above = mix(np.take(flat, top + first, 0), np.take(flat, top + second, 0), across)
        below = mix(np.take(flat, top + WIDTH + first, 0), np.take(flat, top + WIDTH + second, 0), across)
        return mix(above, below, down)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Canonical coordinates of the texels."""

    side: Floats  # (HEIGHT, WIDTH) signed x of the surface in front, decimetres
    height: Floats
    places: Floats  # (HEIGHT, WIDTH, 3) on the cylinder
    front: Floats  # 1 on the face, 0 behind


@functools.cache
def _grid() -> _Grid:
    y = TOP - (np.arange(HEIGHT) + 0.5) * (TOP - BOTTOM) / HEIGHT
    turn = (np.arange(WIDTH) + 0.5) * 360 / WIDTH - 180
    height, theta = (part.astype(np.float32) for part in np.meshgrid(y, turn, indexing="ij"))
    # A face is flatter than the cylinder: map the angle around the axis to x of the surface.
    x = np.linspace(0, 1.15, 100)
    side = np.sign(theta) * np.interp(np.abs(theta), np.degrees(np.arctan2(x, 1.18 - 0.84 * x * x)), x)
    radians = np.radians(theta)
    places = np.stack([RADIUS * np.sin(radians), height, AXIS + RADIUS * np.cos(radians)], -1)
    return _Grid(
        side.astype(np.float32), height, places.astype(np.float32), (np.abs(theta) < 80).astype(np.float32)
    )


def tone_color(person: Person) -> Floats:
    """Display colour (3,) of the plain skin."""
    below = min(int(person.look.tone), len(TONES) - 2)
    color = mix(TONES[below], TONES[below + 1], person.look.tone - below)
    under = np.array(person.look.undertone, np.float32) * np.array([0.6, 0.5, 0.9], np.float32)
    return color * (1 + np.float32(0.02) * np.clip(under, -2, 2))


@functools.lru_cache(maxsize=64)
def skin_map(person: Person) -> SkinMap:
    """Paint the skin of a person. The results are cached."""
    grid, look = _grid(), person.look
    rng = np.random.default_rng(look.texture_seed)
    base = tone_color(person)
    across, along = grid.side * 0.45 + float(rng.random()), grid.height * 0.45 + float(rng.random())
    soft, rough = look_up(blotches(), across, along) - 0.5, look_up(grain(), across, along) - 0.5
    colors = base * (1 + 0.07 * soft + 0.05 * rough)[..., None]
    colors = _flush(colors, person)
    colors = _hair_roots(colors, person, rough)
    colors = _freckles_and_moles(colors, person, rng)
    brow = _brow(look.brows)[..., None]
    ink = np.array(look.hair.color, np.float32) * np.float32(
        min(0.72, BROW_BRIGHTNESS / max(look.hair.color))
    )
    return SkinMap(linear(np.clip(mix(colors, ink, brow), 0, 1)), linear(base))


def _spot(x: float, y: float, width: float, height: float) -> Floats:
    """Opacity (HEIGHT, WIDTH), 0..1, of a soft spot on both sides of the face."""
    grid = _grid()
    return np.exp(-(((np.abs(grid.side) - x) / width) ** 2) - ((grid.height - y) / height) ** 2) * grid.front


@functools.cache
def _places_of_color() -> dict[str, Floats]:
    return {
        "flush": 0.8 * _spot(0.45, 6.92, 0.2, 0.17)
        + 0.5 * _spot(0, 6.95, 0.13, 0.11)
        + 0.25 * _spot(0, 6.3, 0.2, 0.13),
        "under_eyes": _spot(0.3, 7.12, 0.15, 0.05),
        "eyelids": _spot(0.31, 7.36, 0.16, 0.05),
    }


def _flush(colors: Floats, person: Person) -> Floats:
    """Paint the cheeks, the shadows under the eyes, and make-up on the lids."""
    look, woman = person.look, person.sex == "woman"
    spots = _places_of_color()
    shows = float(smoothstep(4.5, 2.0, np.float32(look.tone)))
    strength = 0.03 + (0.03 + 0.06 * woman) * shows + 0.02 * min(abs(look.undertone[0]), 2) * shows
    colors = colors * (1 - spots["flush"][..., None] * strength * np.array([0.0, 1.0, 0.85], np.float32))
    tired = 0.03 + 0.12 * float(smoothstep(30, 68, np.float32(person.age)))
    colors = colors * (1 - spots["under_eyes"][..., None] * tired * np.array([0.7, 1.0, 0.8], np.float32))
    if woman:
        paint = 0.28 * look.lips[2] * np.array([0.5, 0.8, 0.6], np.float32)
        colors = colors * (1 - spots["eyelids"][..., None] * paint)
    return colors


def _hair_roots(colors: Floats, person: Person, rough: Floats) -> Floats:
    """Paint the roots of hair and beard."""
    grid, look = _grid(), person.look
    hair = np.array(look.hair.color, np.float32)
    if person.sex == "man":
        share = {"none": 0.07, "moustache": 0.07, "stubble": 0.5, "goatee": 0.14, "full": 0.55}[look.beard]
        grown = (
            smoothstep(-0.03, 0.12, inside_beard(grid.places)[0])
            * share
            * (0.6 + 0.8 * np.clip(rough * 1.5 + 0.5, 0, 1))
        )
        colors = mix(colors, hair * 0.9, np.clip(grown, 0, 0.75)[..., None])
    strength = {"bald": 0.18, "buzz": 0.6}.get(look.hair.style, 0.8)
    scalp = smoothstep(-0.02, 0.14, above_hairline(grid.places, recession=look.hair.recession)) * strength
    return mix(colors, hair, scalp[..., None])


def _freckles_and_moles(colors: Floats, person: Person, rng: np.random.Generator) -> Floats:
    for _ in range(int(person.look.freckles * 160)):
        x, y = 0.33 * float(rng.standard_normal()), 6.99 + 0.12 * float(rng.standard_normal())
        _dot(colors, x, y, 0.4 + 0.5 * float(rng.random()), (0.62, 0.38, 0.25), 0.38)
    for _ in range(person.look.moles):
        x = (1 if rng.random() < 0.5 else -1) * (0.2 + 0.3 * float(rng.random()))
        low, high = ((6.3, 6.4), (6.84, 7.06), (7.62, 7.8))[int(rng.random() * 3)]
        _dot(
            colors,
            x,
            low + (high - low) * float(rng.random()),
            1.0 + 0.5 * float(rng.random()),
            (0.25, 0.15, 0.11),
            0.85,
        )
    return colors


def _dot(
    colors: Floats, x: float, y: float, radius: float, color: tuple[float, float, float], opacity: float
) -> None:
    """Paint a dot in place. `x` and `y` are canonical, the radius is in texels."""
    turn = np.degrees(np.arctan2(x, 1.18 - 0.84 * x * x))
    column, row = (turn + 180) / 360 * WIDTH - 0.5, (TOP - y) / (TOP - BOTTOM) * HEIGHT - 0.5
    left, top = int(column) - 3, int(row) - 3
    rows, columns = np.mgrid[top : top + 8, left : left + 8]
    away = np.sqrt((rows - row) ** 2 + (columns - column) ** 2).astype(np.float32)
    cover = opacity * np.clip(radius + 0.5 - away, 0, 1)[..., None]
    window = colors[top : top + 8, left : left + 8]
    window[...] = mix(window, color, cover)


def _brow(brows: Brows) -> Floats:
    """Opacity (HEIGHT, WIDTH), 0..1, of the brows."""
    grid = _grid()
    along = (np.abs(grid.side) - brows.gap) / (brows.reach - brows.gap)
    u = np.clip(along, 0, 1)
    middle = (
        BROW_LINE + brows.height + (brows.arch + 0.035) * np.sin(np.pi * np.minimum(u / 1.25, 1))
        + brows.tilt * (u - 0.4) - 0.03 * smoothstep(0.6, 1, u)
    )  # fmt: skip
    half = brows.thickness * (1 - 0.7 * smoothstep(0.35, 1, u)) * (0.75 + 0.25 * smoothstep(0, 0.2, u))
    off = grid.height - middle
    edge = np.float32(0.012)
    inside = (
        smoothstep(1, -1, (np.abs(off) - half) / edge)
        * smoothstep(-0.06, 0.08, along)
        * smoothstep(1.03, 0.9, along)
    )
    lean = 1.4 - 1.1 * u  # hairs are upright at the inner end and flat at the outer end
    hairs = look_up(strands(), np.abs(grid.side) * 0.55 - off * 0.4 / (lean + 0.3) + 0.37, off * 0.6)
    return inside * np.clip((0.55 + 0.4 * brows.density) + 0.16 * hairs, 0, 0.97) * grid.front
