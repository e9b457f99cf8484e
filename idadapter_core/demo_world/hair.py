"""Hair and beards: shells of strands over the skin, a curtain of long hair, and a bun."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from . import canvas as kinds
from .arrays import Floats, Ints, normals, rotate, smoothstep
from .canvas import FAINT
from .head import above_hairline, angle, inside_beard, load_head
from .identity import LONG_STYLES, Hair
from .noise import blotches, grain, look_up
from .shading import strand_noise
from .shot import Shot

CLOSE = 0.012  # decimetres between the skin and the innermost shell
# Of each shell: height relative to the thickness of the hair, share of strands that reach it, brightness (hair is darker inside).
SHELLS = ((0.62, 1.0, 0.72), (0.84, 0.62, 0.92), (1.0, 0.36, 1.08))
CURLY_SHELLS = ((0.2, 1.0, 0.55), (0.5, 1.0, 0.7), *SHELLS[1:])
# Of each sheet of long hair: offset in decimetres, share of strands, brightness. The inner sheets give depth to hair seen edge-on.
CURTAIN = ((0.0, 1.0, 0.85), (-0.08, 1.0, 0.72), (-0.16, 1.0, 0.62), (0.04, 0.55, 1.0))
# Opening of the curtain at the face: template heights, and degrees from the front.
OPENING_HEIGHTS, OPENING_ANGLES = (4, 6.2, 7.2, 7.9, 8.4), (40, 46, 50, 40, 10)
FRINGE = 0.36  # decimetres by which a fringe hangs below the hairline
CURLY = ("curly", "afro")
UNDER_HAT = 0.07

Thickness = Callable[[Hair, Floats, Floats, Floats], Floats]
Cover = Callable[
    [Floats, Floats, Floats], Floats
]  # opacity (M,) from canonical coordinates, normals and streaks


@functools.cache
def scalp() -> Ints:
    """Triangles (T, 3) that hair may grow on."""
    head = load_head()
    return head.skin_where(above_hairline(head.template, FRINGE) > -0.05)


@functools.cache
def _beard_skin() -> Ints:
    head = load_head()
    skin = head.skin_where(inside_beard(head.template)[0] > -0.12)
    return skin[head.template[skin][:, :, 2].mean(1) > 0.3]


def _top(y: Floats) -> Floats:
    return smoothstep(7.5, 8.3, y)


def _front(places: Floats) -> Floats:
    return np.exp(-((angle(places) / 48) ** 2)) * smoothstep(7.65, 8.0, places[:, 1])


def _parted(hair: Hair, places: Floats) -> Floats:
    """How flat the hair lies along the parting (V,), 0..1."""
    side = places[:, 0] * hair.part
    return np.exp(-(((side - 0.42) / 0.07) ** 2)) * smoothstep(7.6, 7.9, places[:, 1])


# Thickness of the hair (V,) in decimetres. Arguments: hair, canonical coordinates (V, 3), weight of the top of the head (V,) in 0..1,
# and soft noise (V,) in -0.5..0.5.
THICKNESS: Mapping[str, Thickness] = {
    "buzz": lambda hair, p, top, n: np.full(len(p), 0.02, np.float32),
    "short": lambda hair, p, top, n: 0.05 + (0.07 + 0.10 * hair.length) * top + 0.05 * n,
    "quiff": lambda hair, p, top, n: 0.05 + 0.10 * top + (0.16 + 0.14 * hair.length) * _front(p) + 0.08 * n,
    "side_part": lambda hair, p, top, n: 0.06 + 0.12 * top
    + 0.10 * top * smoothstep(-0.3, 0.5, -p[:, 0] * hair.part) - 0.09 * _parted(hair, p) + 0.05 * n,
    "curly": lambda hair, p, top, n: 0.17 + 0.10 * top + 0.28 * n + 0.12 * hair.length,
    "afro": lambda hair, p, top, n: 0.34 + 0.12 * top + 0.14 * n + 0.18 * hair.length,
    "bob": lambda hair, p, top, n: 0.10 + 0.08 * top - 0.05 * _parted(hair, p) + 0.04 * n,
    "fringe": lambda hair, p, top, n: 0.10 + 0.06 * top + 0.03 * n,
    "long": lambda hair, p, top, n: 0.09 + 0.06 * top - 0.05 * _parted(hair, p) + 0.03 * n,
    "wavy": lambda hair, p, top, n: 0.11 + 0.09 * top - 0.05 * _parted(hair, p) + 0.06 * n,
    "bun": lambda hair, p, top, n: 0.05 + 0.03 * top + 0.02 * n,
}  # fmt: skip


def _line(hair: Hair, places: Floats) -> Floats:
    return above_hairline(places, FRINGE if hair.style == "fringe" else 0.0, hair.recession)


def thickness(hair: Hair, hat: bool) -> Floats:
    """Thickness of the hair (V,) at each vertex, in decimetres."""
    places = load_head().template
    shift = 0.137 * hair.length
    soft = (
        look_up(
            blotches(),
            places[:, 0] * 0.6 + places[:, 2] * 0.4 + shift,
            places[:, 1] * 0.6 + places[:, 2] * 0.5,
        )
        - 0.5
    )
    height = THICKNESS[hair.style](hair, places, _top(places[:, 1]), soft)
    ramp = 0.14 if hair.style in LONG_STYLES else 0.30
    height = np.maximum(height, 0.01) * smoothstep(-0.03, ramp, _line(hair, places))
    if hat:
        height = np.minimum(height, UNDER_HAT + 0.4 * smoothstep(7.6, 7.2, places[:, 1]))
    return height.astype(np.float32)


def casters(mesh: Floats, directions: Floats, hair: Hair, hat: bool) -> tuple[Floats, Ints] | None:
    """The part of the hair that casts shadows, as vertices (V, 3) and triangles (T, 3), or None."""
    if hair.style in ("bald", "buzz"):
        return None
    dense = scalp()[(_line(hair, load_head().template) > 0.05)[scalp()].all(1)]
    outer = mesh + directions * (0.7 * thickness(hair, hat))[:, None]
    return outer.astype(np.float32), dense


def draw_hair(shot: Shot, hat: bool) -> None:
    """Paint the hair of the head."""
    hair = shot.person.look.hair
    if hair.style in LONG_STYLES:
        _draw_curtain(shot, hair, hat)
    if hair.style == "buzz":
        _draw_shell(shot, hair, np.full(len(shot.mesh), 0.02, np.float32), 1.0, 1.0)
    elif hair.style != "bald":
        height = thickness(hair, hat)
        for level, share, brightness in CURLY_SHELLS if hair.style in CURLY else SHELLS:
            _draw_shell(shot, hair, height * np.float32(level) + np.float32(CLOSE), share, brightness)
    if hair.style == "bun" and not hat:
        _draw_bun(shot, hair)


def _across(hair: Hair, place: Floats) -> Floats:
    """Coordinate across the strands (M,), around the crown or from side to side, in periods of the noise."""
    if hair.style in ("quiff", "side_part"):
        return place[:, 0] * 0.75 + 0.6 * place[:, 2] * smoothstep(0.4, 0.7, np.abs(place[:, 0]))
    if hair.style in LONG_STYLES and hair.style != "fringe":
        return place[:, 2] * 0.6 + 0.05 * np.abs(place[:, 0])
    bend = 0.02 * np.sin(place[:, 1] * 9 + 4 * place[:, 0])
    return np.arctan2(place[:, 0], place[:, 2] - np.float32(0.2)) * 0.8 + bend


def _streaks(hair: Hair, place: Floats, swing: float = 0.0) -> Floats:
    """Lighter and darker strands or curls (M), about -1..1."""
    if hair.style in CURLY:
        fine = (
            look_up(grain(), place[:, 0] * 1.1 + place[:, 2] * 0.7, place[:, 1] * 1.1 + place[:, 2] * 0.4)
            - 0.5
        )
        coils = (
            look_up(blotches(), place[:, 0] * 1.5 + place[:, 2], place[:, 1] * 1.5 + place[:, 2] * 0.6) - 0.5
        )
        return 1.5 * fine + 1.7 * coils
    across = _across(hair, place) + swing * 0.03 * np.sin(place[:, 1] * 6.5)
    return 0.62 * strand_noise(across, place[:, 1] * 0.12 + place[:, 2] * 0.05)


def _light(
    shot: Shot, hair: Hair, place: Floats, normal: Floats, points: Floats, streaks: Floats, brightness: float
) -> Floats:
    down = np.stack([place[:, 0] * 0.8, np.full(len(place), -1.0, np.float32), (place[:, 2] - 0.2) * 0.8], 1)
    contrast = 0.32 if max(hair.color) > 0.5 else 0.6
    color = np.array(hair.color, np.float32) * np.float32(brightness)
    gloss = 0.35 if hair.style in CURLY else 1.0
    return shot.lighting.hair(
        color, normal, points, rotate(down, shot.pose.head), streaks * np.float32(contrast), gloss
    )


def _paint(
    shot: Shot,
    vertices: Floats,
    directions: Floats,
    triangles: Ints,
    brightness: float,
    cover: Cover,
    swing: float = 0.0,
) -> None:
    """Paint a sheet of strands. Light is computed only where the sheet is visible and not transparent."""
    seen = shot.draw(vertices, triangles)
    seen = seen.select(shot.canvas.visible(seen))
    if not len(seen):
        return
    hair = shot.person.look.hair
    points, normal, place = shot.attributes(seen, vertices, directions, shot.head.template)
    streaks = _streaks(hair, place, swing)
    alpha = cover(place, normal, streaks)
    shown = alpha > FAINT
    light = _light(shot, hair, place[shown], normal[shown], points[shown], streaks[shown], brightness)
    shot.canvas.paint(seen.select(shown), light, kinds.HAIR, alpha[shown], hides=0.9)


def _draw_shell(shot: Shot, hair: Hair, height: Floats, share: float, brightness: float) -> None:
    def cover(place: Floats, normal: Floats, streaks: Floats) -> Floats:
        edge = _line(hair, place)
        if hair.style == "buzz":
            return 0.75 * smoothstep(-0.03, 0.15, edge + 0.03 * streaks)
        alpha = smoothstep(-0.02, 0.05, edge + 0.028 * streaks)
        if share == 1:
            return alpha
        threshold = 0.9 - 1.5 * share
        loose = smoothstep(threshold - 0.35, threshold + 0.35, streaks) * smoothstep(0.0, 0.12, edge)
        return alpha * loose * _no_loose_dots(normal)

    triangles = scalp()[(_line(hair, shot.head.template) > -0.06)[scalp()].any(1)]
    vertices = (shot.mesh + shot.normals * height[:, None]).astype(np.float32)
    _paint(shot, vertices, normals(vertices, triangles), triangles, brightness, cover)


def _no_loose_dots(normal: Floats) -> Floats:
    """Opacity (M,), 0..1, that hides strands seen edge-on: they would be dots around the outline."""
    return smoothstep(0.05, 0.45, normal[:, 2])


def _cut(hair: Hair) -> float:
    """Template height at which long hair ends, in decimetres."""
    if hair.style in ("bob", "fringe"):
        return 6.15 + 0.4 * hair.length
    return 4.5 + 1.1 * hair.length


def curtain(hair: Hair) -> Ints:
    """Triangles (T, 3) of the hair that hangs beside the neck and down the back."""
    head = load_head()
    if hair.style not in LONG_STYLES:
        return head.hair[:0]
    places = head.template[head.hair]
    return head.hair[
        (angle(head.template)[head.hair].max(1) > 38) & (places[:, :, 1].max(1) > _cut(hair) - 0.1)
    ]


def _draw_curtain(shot: Shot, hair: Hair, hat: bool) -> None:
    triangles = curtain(hair)
    end, ragged = _cut(hair), 0.10 if hair.style in ("bob", "fringe") else 0.28
    for off, share, brightness in CURTAIN:

        def cover(place: Floats, normal: Floats, streaks: Floats, share: float = share) -> Floats:
            y = place[:, 1]
            opening = np.interp(y, OPENING_HEIGHTS, OPENING_ANGLES).astype(np.float32)
            alpha = smoothstep(-2.0, 3.0, angle(place) - opening - 1.5 * streaks)
            alpha = alpha * smoothstep(-0.04, 0.06, y - end - ragged * streaks)
            if share < 1:
                alpha = alpha * smoothstep(-0.4, 0.3, streaks) * _no_loose_dots(normal)
            return alpha * smoothstep(7.75, 7.6, y) if hat else alpha

        vertices = (shot.mesh + shot.normals * np.float32(off)).astype(np.float32)
        _paint(
            shot, vertices, shot.normals, triangles, brightness, cover, 1.0 if hair.style == "wavy" else 0.0
        )


@functools.cache
def _ball() -> tuple[Floats, Ints]:
    """Vertices (V, 3) and triangles (T, 3) of a sphere of radius 1."""
    turns, steps = 24, 14
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, turns), np.linspace(0, np.pi, steps))
    vertices = np.stack([np.cos(u) * np.sin(v), np.cos(v), np.sin(u) * np.sin(v)], -1).reshape(-1, 3)
    first = np.arange((steps - 1) * turns).reshape(steps - 1, turns)[:, :-1].ravel()
    lower = first + turns
    corners = np.concatenate(
        [np.stack([first, lower, lower + 1], 1), np.stack([first, lower + 1, first + 1], 1)]
    )
    return vertices.astype(np.float32), corners.astype(np.int32)


def _draw_bun(shot: Shot, hair: Hair) -> None:
    sphere, triangles = _ball()
    crown = shot.mesh[shot.head.nearest(0, 8.42, 0.2)]
    radius = 0.28 + 0.10 * hair.length
    center = crown + rotate(np.array([0, 0.16, -0.12], np.float32), shot.pose.head)
    vertices = (center + radius * rotate(sphere, shot.pose.head)).astype(np.float32)
    fragments = shot.draw(vertices, triangles)
    points, normal, place = shot.attributes(fragments, vertices, vertices - center, sphere)
    coil = 0.5 * strand_noise(
        place[:, 1] * 0.55 + 0.10 * place[:, 0], np.arctan2(place[:, 0], place[:, 2]) * 0.2
    )
    around = rotate(np.stack([place[:, 2], 0 * place[:, 0], -place[:, 0]], 1), shot.pose.head)
    color = np.array(hair.color, np.float32)
    shot.canvas.paint(fragments, shot.lighting.hair(color, normal, points, around, coil), kinds.HAIR)


def draw_beard(shot: Shot) -> None:
    """Paint a moustache, a goatee or a full beard. Stubble is part of the skin map."""
    look = shot.person.look
    if look.beard not in ("moustache", "goatee", "full"):
        return
    template = shot.head.template
    depth = inside_beard(template)[0]
    height = (0.03 + 0.09 * smoothstep(0.0, 0.3, depth) * (look.beard == "full")) * smoothstep(
        -0.03, 0.06, depth
    )
    height = height * smoothstep(70, 45, angle(template))
    vertices = (shot.mesh + shot.normals * height[:, None]).astype(np.float32)
    seen = shot.draw(vertices, _beard_skin(), cull=True)
    points, normal, place = shot.attributes(seen, vertices, shot.normals, template)
    full, moustache = inside_beard(place)
    side = np.abs(place[:, 0])
    area = full
    if look.beard == "moustache":
        area = moustache
    elif look.beard == "goatee":
        area = np.minimum(full, 0.40 - side)
    lips = np.exp(-(((place[:, 1] - 6.61) / 0.095) ** 4) - (side / 0.27) ** 4)
    rough = look_up(grain(), place[:, 0] * 2.4, place[:, 1] * 0.9) - 0.5
    alpha = 0.92 * smoothstep(-0.04, 0.09, area + 0.14 * rough - 0.5 * lips) * _no_loose_dots(normal)
    down = rotate(
        np.stack([place[:, 0] * 0.5, np.full(len(place), -1.0, np.float32), 0 * side], 1), shot.pose.head
    )
    light = shot.lighting.hair(np.array(look.hair.color, np.float32), normal, points, down, 1.1 * rough, 0.5)
    shot.canvas.paint(seen, light, kinds.BEARD, alpha)
