"""Draws the chart of a comparison: one row for each picture, with a bar for its similarity over the bands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage, ImageDraw, ImageFont

from .faces.images import Image
from .likeness import BANDS, Likeness, Person, best_of, mean_of

WIDTH, ROW, HEAD, EDGE = 440, 100, 70, 10  # pixels: narrow, because a node shows it at half its size
BAR_LEFT, BAR_RIGHT = 106, WIDTH - EDGE
BAR_TOP, BAR_BOTTOM = 34, 58  # in a row
GROUND, INK, FAINT = (28, 28, 30), (236, 236, 236), (150, 150, 154)
COLORS = ((56, 168, 92), (146, 184, 66), (222, 160, 58), (204, 82, 70))  # of the bands, best first
INDEPENDENT = (126, 158, 214)
MOST_ROWS = 16  # pictures; of more, the best and the worst are shown


def draw_chart(person: Person, pictures: Sequence[Image], found: Sequence[Likeness]) -> Image:
    """Draw a chart (H, W, 3), RGB uint8, of pictures (H, W, 3), RGB uint8, and their likenesses."""
    shown = rows_shown(found)
    canvas = PILImage.new("RGB", (WIDTH, HEAD + ROW * len(shown) + EDGE), GROUND)
    draw = ImageDraw.Draw(canvas)
    best = best_of(found)
    seen = found[best].similarity
    head = "no face found" if seen is None else f"best {seen:.2f}: {person.words(seen)}"
    draw.text((EDGE, EDGE), head, INK, _font(24))
    draw.text((EDGE, EDGE + 32), _note(found, shown), FAINT, _font(16))
    scale = _Scale(person, found)
    for place, number in enumerate(shown):
        top = HEAD + ROW * place
        canvas.paste(_thumbnail(pictures[number]), (EDGE, top))
        _draw_row(draw, top, number, found[number], person, scale, number == best)
    return np.array(canvas, dtype=np.uint8)


def rows_shown(found: Sequence[Likeness]) -> list[int]:
    """Indices of the pictures with a row, in their order: all, or the best and the worst."""
    if len(found) <= MOST_ROWS:
        return list(range(len(found)))
    ranked = sorted(range(len(found)), key=lambda k: found[k].or_else(-2.0))
    half = MOST_ROWS // 2
    return sorted([*ranked[:half], *ranked[-half:]])


class _Scale:
    """Maps similarities to pixels: 0 at the left, the largest of what is shown, or four thirds of what another photo comes to, at the right."""

    def __init__(self, person: Person, found: Sequence[Likeness]) -> None:
        values = [x for one in found for x in (one.similarity, one.independent) if x is not None]
        self._most = max([*values, person.expected * 4 / 3])

    def __call__(self, similarity: float) -> float:
        share = min(max(similarity / self._most, 0.0), 1.0)
        return BAR_LEFT + share * (BAR_RIGHT - BAR_LEFT)


def _draw_row(
    draw: ImageDraw.ImageDraw,
    top: int,
    number: int,
    one: Likeness,
    person: Person,
    scale: _Scale,
    is_best: bool,
) -> None:
    upper, lower = top + BAR_TOP, top + BAR_BOTTOM
    edges = [scale(least * person.expected) for least, _ in BANDS[:-1]]
    for left, right, color in zip((*edges, BAR_LEFT), (BAR_RIGHT, *edges), COLORS, strict=True):
        draw.rectangle((left, upper, right, lower), _dimmed(color))
    if one.similarity is None:
        draw.text((BAR_LEFT, top + 4), f"{number + 1}: no face found", FAINT, _font(20))
        return
    color = COLORS[person.band(one.similarity)]
    draw.text(
        (BAR_LEFT, top + 4),
        f"{number + 1}{', best' if is_best else ''}: {one.similarity:.2f}",
        INK,
        _font(20),
    )
    words = person.words(one.similarity)
    draw.text((BAR_RIGHT - draw.textlength(words, _font(18)), top + 6), words, color, _font(18))
    draw.rectangle((BAR_LEFT, upper, scale(one.similarity), lower), color)
    if one.independent is not None:
        draw.rectangle((BAR_LEFT, lower + 4, scale(one.independent), lower + 11), INDEPENDENT)
        draw.text((BAR_LEFT, lower + 13), f"independent {one.independent:.2f}", INDEPENDENT, _font(15))


def _dimmed(color: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(round(0.25 * light + 0.75 * dark) for light, dark in zip(color, GROUND, strict=True))


def _note(found: Sequence[Likeness], shown: Sequence[int]) -> str:
    missed = sum(one.similarity is None for one in found)
    parts = [f"{mean_of(found):.2f} on average"] if len(found) > 1 else []
    parts += [f"{missed} of {len(found)} without a face"] if missed else []
    if len(shown) < len(found):
        parts.append(f"{MOST_ROWS // 2} best and {MOST_ROWS // 2} worst of {len(found)}")
    return "; ".join(parts)


def _thumbnail(picture: Image) -> PILImage.Image:
    """A square of the row's height, with the picture in its middle."""
    side = ROW - 8
    small = PILImage.fromarray(picture)
    small.thumbnail((side, side))
    square = PILImage.new("RGB", (side, side), GROUND)
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
