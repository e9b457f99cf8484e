"""Charts as inline SVG: no script, no files, readable in light and dark mode.

Colours come from the page's style sheet: the series classes s0, s1, ... set `color`; classes like axis and grid style the rest. The
label of every chart describes its content.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_THINNEST = 3.0  # smallest height of a bar, pixels
COLORS = 10  # classes s0 .. s9 in the style sheet
WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 14, 50
MARKERS = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z",  # circle
    "M-4-4H4V4H-4Z",  # square
    "M0-5.5L5.5 0L0 5.5L-5.5 0Z",  # diamond
    "M0-5L5 4H-5Z",  # triangle
    "M0 5L5-4H-5Z",
    "M-4.5-2H-2V-4.5H2V-2H4.5V2H2V4.5H-2V2H-4.5Z",  # plus
)


@dataclass(frozen=True)
class Point:
    """A point with its intervals and a short label."""

    x: float
    y: float
    label: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points of one run. `number` selects colour and marker."""

    name: str
    number: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Bars:
    """A run's value in each group; None for missing values."""

    name: str
    number: int
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None]


class _Axis:
    """Maps values to pixels, with round numbers as ticks."""

    def __init__(
        self, values: Sequence[float], first: float, last: float, zero: bool = False, least: float = 0.0
    ) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        least = least or (0.1 if high - low < 1e-9 else 0.0)
        if high - low < least:  # a meaningless difference must not fill the chart
            more = (least - (high - low)) / 2
            low, high = low - more, high + more
        room = 0.05 * (high - low)
        self.low = low if zero and low == 0 else low - room
        self.high = high if zero and high == 0 else high + room
        step = _round_step((self.high - self.low) / 7)
        numbers = range(math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6) + 1)
        self.ticks = [number * step for number in numbers]
        self._digits = max(0, -math.floor(math.log10(step) + 1e-9))
        self._first, self._scale = first, (last - first) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return round(self._first + (value - self.low) * self._scale, 1)

    def text(self, tick: float) -> str:
        """Label of a tick."""
        return f"{tick:.{self._digits}f}"


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def scatter(
    series: Sequence[Series], x_title: str, y_title: str, label: str, least: tuple[float, float] = (0.1, 0.1)
) -> str:
    """Scatter chart of points with intervals; the points of a series are joined in order.

    Args:
        least: smallest ranges of x and y to show.
    """
    points = [point for one in series for point in one.points]
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    x = _Axis(xs, LEFT, WIDTH - RIGHT, least=least[0])
    y = _Axis(ys, HEIGHT - BOTTOM, TOP, least=least[1])
    parts = [*_frame(x, y, x_title, y_title)]
    signs, labels = [], []  # drawn over all lines
    taken = [(x(p.x) - 5, y(p.y) - 5, 10.0, 10.0) for p in points]
    for one in series:
        color = color_of(one.number)
        places = [(x(p.x), y(p.y)) for p in one.points]
        if len(places) > 1:
            parts.append(
                f'<polyline class="line {color}" points="{" ".join(f"{a},{b}" for a, b in places)}"/>'
            )
        for point, (a, b) in zip(one.points, places, strict=True):
            parts += _intervals(point, x, y, color)
            signs.append(_marker(one.number, a, b))
            if point.label:
                labels.append(_beside(point.label, a, b, color, taken))
    return _svg([*parts, *signs, *labels], label)


def curves(series: Sequence[Series], x_title: str, y_title: str, label: str) -> str:
    """Line chart without markers."""
    points = [point for one in series for point in one.points]
    x = _Axis([p.x for p in points], LEFT, WIDTH - RIGHT)
    y = _Axis([p.y for p in points], HEIGHT - BOTTOM, TOP)
    parts = [*_frame(x, y, x_title, y_title)]
    for one in series:
        path = " ".join(f"{x(p.x)},{y(p.y)}" for p in one.points)
        parts.append(f'<polyline class="line {color_of(one.number)}" points="{path}"/>')
    return _svg(parts, label)


def bars(groups: Sequence[str], series: Sequence[Bars], y_title: str, label: str) -> str:
    """Grouped bar chart with intervals."""
    found = [v for one in series for v in one.values if v is not None]
    found += [v for one in series for interval in one.intervals if interval for v in interval]
    width = max(WIDTH, LEFT + RIGHT + len(groups) * (len(series) * 12 + 16))
    y = _Axis(found, HEIGHT - BOTTOM, TOP, zero=True)
    parts = _rows(y, width) + [_y_title(y_title)]
    room = (width - LEFT - RIGHT) / len(groups)
    thick = min((room - 12) / len(series), 26)
    zero = y(0)
    for place, group in enumerate(groups):
        middle = LEFT + (place + 0.5) * room
        parts.append(
            f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(group)}</text>'
        )
        for number, one in enumerate(series):
            value, interval = one.values[place], one.intervals[place]
            left = middle + (number - len(series) / 2) * thick
            if value is None:
                parts.append(
                    f'<text class="note" x="{left + thick / 2:.1f}" y="{zero - 4}" text-anchor="middle">–</text>'
                )
                continue
            top, bottom = sorted((y(value), zero))
            if bottom - top < _THINNEST:  # a value of 0 must look different from a missing one
                top, bottom = zero - _THINNEST / 2, zero + _THINNEST / 2
            color = color_of(one.number)
            parts.append(
                f'<rect class="bar {color}" x="{left + 1:.1f}" y="{top}" width="{thick - 2:.1f}" height="{bottom - top:.1f}"/>'
            )
            if interval:
                low, high = y(interval[0]), y(interval[1])
                parts.append(f'<path class="whisker" d="M{left + thick / 2:.1f} {low}V{high}"/>')
    parts.append(f'<path class="zero" d="M{LEFT} {zero}H{width - RIGHT}"/>')
    return _svg(parts, label, width)


def histogram(
    filled: Sequence[tuple[str, str, Sequence[float]]],
    outlined: Sequence[tuple[str, str, Sequence[float]]],
    threshold: float | None,
    x_title: str,
    label: str,
) -> str:
    """Histogram: `filled` as areas, `outlined` as lines (name, colour class, values), and a line at the threshold."""
    everything = [v for _, _, values in (*filled, *outlined) for v in values]
    x = _Axis([*everything, *([threshold] if threshold is not None else [])], LEFT, WIDTH - RIGHT)
    count = 30
    size = (x.high - x.low) / count

    def shares(values: Sequence[float]) -> list[float]:
        bins = [0] * count
        for value in values:
            bins[min(max(int((value - x.low) / size), 0), count - 1)] += 1
        return [number / max(len(values), 1) for number in bins]

    heights = [shares(values) for _, _, values in (*filled, *outlined)]
    y = _Axis([0.0, *(v for row in heights for v in row)], HEIGHT - BOTTOM, TOP, zero=True)
    parts = [*_frame(x, y, x_title, "share of pairs")]
    for number, (_, color, _) in enumerate((*filled, *outlined)):
        steps = [f"M{x(x.low)} {y(0)}"]
        for place, height in enumerate(heights[number]):
            steps.append(f"V{y(height)}H{x(x.low + (place + 1) * size)}")
        steps.append(f"V{y(0)}")
        kind = "band" if number < len(filled) else "line"
        parts.append(f'<path class="{kind} {color}" d="{"".join(steps)}{"Z" if kind == "band" else ""}"/>')
    if threshold is not None:
        parts.append(f'<path class="threshold" d="M{x(threshold)} {TOP}V{HEIGHT - BOTTOM}"/>')
        is_right = x(threshold) > WIDTH * 0.75
        anchor, shift = ("end", -5) if is_right else ("start", 5)
        parts.append(
            f'<text class="note" x="{x(threshold) + shift}" y="{TOP + 10}" text-anchor="{anchor}">threshold {threshold:.3f}</text>'
        )
    return _svg(parts, label)


def color_of(number: int) -> str:
    """Colour class of a series."""
    return f"s{number % COLORS}"


def legend(entries: Sequence[tuple[str, int | str, str]]) -> str:
    """Legend of names with their number or colour class, and sign: marker, line, band or bar. Wraps like text."""
    items = []
    for name, number, kind in entries:
        color = number if isinstance(number, str) else color_of(number)
        if kind == "marker" and isinstance(number, int):
            sign = f'<path class="marker" transform="translate(11 8)" d="{MARKERS[number % len(MARKERS)]}"/>'
        elif kind == "line":
            sign = '<path class="line" d="M1 8H21"/>'
        else:
            sign = f'<path class="{kind}" d="M3 3H19V13H3Z"/>'
        items.append(
            f'<li><svg class="{color}" width="22" height="16" viewBox="0 0 22 16" aria-hidden="true">{sign}</svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(parts: Sequence[str], label: str, width: float = WIDTH) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {HEIGHT}" style="min-width:{width * 0.75:.0f}px;max-width:{width * 1.25:.0f}px" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _frame(x: _Axis, y: _Axis, x_title: str, y_title: str) -> list[str]:
    parts = _rows(y, WIDTH)
    for tick in x.ticks:
        parts.append(f'<path class="grid" d="M{x(tick)} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="axis" x="{x(tick)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x.text(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="title" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_title)}</text>'
    )
    return [*parts, _y_title(y_title)]


def _rows(y: _Axis, width: float) -> list[str]:
    parts = []
    for tick in y.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{width - RIGHT}"/>')
        parts.append(
            f'<text class="axis" x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{y.text(tick)}</text>'
        )
    return parts


def _y_title(text: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return f'<text class="title" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _marker(number: int, x: float, y: float) -> str:
    return f'<path class="marker {color_of(number)}" transform="translate({x} {y})" d="{MARKERS[number % len(MARKERS)]}"/>'


def _intervals(point: Point, x: _Axis, y: _Axis, color: str) -> list[str]:
    parts = []
    if point.x_interval:
        parts.append(
            f'<path class="interval {color}" d="M{x(point.x_interval[0])} {y(point.y)}H{x(point.x_interval[1])}"/>'
        )
    if point.y_interval:
        parts.append(
            f'<path class="interval {color}" d="M{x(point.x)} {y(point.y_interval[0])}V{y(point.y_interval[1])}"/>'
        )
    return parts


def _beside(text: str, x: float, y: float, color: str, taken: list[tuple[float, float, float, float]]) -> str:
    """Label a point at the first free of eight places around it.

    Returns "" if none is free: the legend and the table name the point, too.
    """
    width, height = 6.3 * len(text) + 2, 13.0
    for left, top in (
        (x + 8, y - 14),
        (x - 8 - width, y - 14),
        (x + 8, y + 3),
        (x - 8 - width, y + 3),
        (x - width / 2, y - 22),
        (x - width / 2, y + 9),
        (x + 9, y - 6),
        (x - 9 - width, y - 6),
    ):
        box = (left, top, width, height)
        is_inside = LEFT < left and left + width < WIDTH and TOP <= top + 4 and top + height < HEIGHT - BOTTOM
        if is_inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return f'<text class="point {color}" x="{left:.1f}" y="{top + 10:.1f}">{escape(text)}</text>'
    return ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
