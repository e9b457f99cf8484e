"""Paints accessories: glasses, hats and scarves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import canvas as kinds
from .arrays import Floats, Ints, column, linear, mix, normalize, smoothstep
from .factors import CLOTHES
from .head import load_head
from .noise import grain, look_up
from .shading import edge_opacity
from .shot import Shot

HATS = ("beanie", "cap")
RIM_POINTS = 36
LENS_HALF = (0.285, 0.215)  # decimetres, half width and half height
LENS_TINT = (0.025, 0.022, 0.03)
BRIM_TURNS, BRIM_STEPS = 17, 6


@functools.cache
def _hat_skin() -> Ints:
    head = load_head()
    return head.skin_where(head.template[:, 1] > 7.5)


@functools.cache
def _neck_skin() -> Ints:
    head = load_head()
    skin = head.skin_where(head.template[:, 1] > 5.2)
    corners = head.template[skin]
    return skin[(corners[:, :, 1].min(1) < 6.15) & (np.abs(corners[:, :, 0]).max(1) < 1.1)]


def draw_accessory(shot: Shot) -> None:
    """Paint the accessory of the factors, if there is one."""
    if shot.factors.accessory != "none":
        WEAR[shot.factors.accessory](shot)


def _color(shot: Shot) -> Floats:
    return np.array(shot.factors.accessory_color, np.float32)


# ----------------------------------------------------------------------------------------------------------- glasses
def _tube(path: Floats, radius: float, closed: bool) -> tuple[Floats, Ints]:
    """Vertices (V, 3) and triangles (T, 3) of a tube of six sides along points (M, 3)."""
    sides, count = 6, len(path)
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
    ahead = normalize(ahead.astype(np.float32))
    first = normalize(np.cross(ahead, np.array([0.05, 0.1, 1.0], np.float32)))
    second = np.cross(ahead, first)
    turn = np.arange(sides) / sides * 2 * np.pi
    ring = np.cos(turn)[None, :, None] * first[:, None] + np.sin(turn)[None, :, None] * second[:, None]
    vertices = (path[:, None] + radius * ring).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(count if closed else count - 1), np.arange(sides), indexing="ij")
    a, b, c, d = (
        ((i + m) % count * sides + (j + n) % sides).ravel() for m, n in ((0, 0), (1, 0), (1, 1), (0, 1))
    )
    corners = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    return vertices.astype(np.float32), corners.astype(np.int32)


def _joined(parts: Sequence[tuple[Floats, Ints]]) -> tuple[Floats, Ints]:
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in parts)])
    triangles = [corners + start for (_, corners), start in zip(parts, starts, strict=False)]
    return np.concatenate([vertices for vertices, _ in parts]), np.concatenate(triangles).astype(np.int32)


def _rim(center: Floats, forward: float, roundness: float) -> Floats:
    """Points (RIM_POINTS, 3) around a lens before the head's rotation: a square with round corners, bent to the face."""
    turn = np.arange(RIM_POINTS) / RIM_POINTS * 2 * np.pi

    def squared(wave: np.ndarray) -> np.ndarray:
        return np.sign(wave) * np.abs(wave) ** (2 / roundness)

    x = center[0] * 1.04 + LENS_HALF[0] * squared(np.cos(turn))
    y = center[1] - 0.03 + LENS_HALF[1] * squared(np.sin(turn))
    return np.stack([x, y, forward - 0.22 * x * x], 1).astype(np.float32)


def _frame(eyes: Floats, forward: float, roundness: float, radius: float) -> tuple[Floats, Ints]:
    """Vertices (V, 3) and triangles (T, 3) of rims, bridge and temples before the head's rotation."""
    parts = [_tube(_rim(eye, forward, roundness), radius, True) for eye in eyes]
    height = float(eyes[0][1])
    bridge = np.stack([np.linspace(-0.08, 0.08, 5), np.full(5, height + 0.06), np.full(5, forward + 0.01)], 1)
    parts.append(_tube(bridge, 0.02, False))
    for eye, side in zip(eyes, (1, -1), strict=True):
        x = float(eye[0]) * 1.04 + side * LENS_HALF[0]
        hinge, ear = (x, height + 0.08, forward - 0.22 * x * x), (side * 0.86, height, -0.55)
        parts.append(_tube(np.linspace(hinge, ear, 8), 0.018, False))
    return _joined(parts)


def _glasses(shot: Shot) -> None:
    dark = shot.factors.accessory == "sunglasses"
    eyes = np.stack([shot.still[part].mean(0) for part in shot.head.eye_vertices])
    forward = float(eyes[:, 2].max()) + 0.30
    roundness = 2.2 + (shot.factors.seed % 5) * 0.5  # 2 is an ellipse, large values a rectangle
    _lenses(shot, [_rim(eye, forward, roundness) for eye in eyes], dark)
    vertices, triangles = _frame(eyes, forward, roundness, 0.028 if dark else 0.02)
    seen, normal, points = shot.draw_solid(shot.pose(vertices), triangles)
    color = linear(mix(_color(shot), (0.07, 0.07, 0.08), 1.0 if dark or shot.factors.seed % 2 else 0.35))
    light = shot.lighting.surface(
        np.broadcast_to(color, normal.shape), normal, points, 0.9, 0.35, 32, shadows=False
    )
    shot.canvas.paint(seen, light, kinds.GLASSES)


def _lenses(shot: Shot, rims: Sequence[Floats], dark: bool) -> None:
    fan = np.array([[i, (i + 1) % RIM_POINTS, RIM_POINTS] for i in range(RIM_POINTS)], np.int32)
    for rim in rims:
        still = np.concatenate([rim, rim.mean(0, keepdims=True)])
        vertices = shot.pose(still)
        seen = shot.draw(vertices, fan)
        if not len(seen):
            continue
        place = seen.interpolate(still - still[-1])
        if dark:
            above = smoothstep(-0.15, 0.25, place[:, 1] + 0.4 * place[:, 0])
            color = linear(LENS_TINT) + column(0.028 * above) * shot.lighting.ambient
            alpha = np.full(len(seen), 0.96, np.float32)
        else:
            glint = smoothstep(0.03, 0.0, np.abs(place[:, 0] + place[:, 1] * 0.5 - 0.12)) * smoothstep(
                0.0, 0.12, place[:, 1]
            )
            color = np.full((len(seen), 3), 0.8, np.float32)
            alpha = (0.03 + 0.22 * glint).astype(np.float32)
        shot.canvas.paint(seen, color, kinds.GLASSES, alpha)


# -------------------------------------------------------------------------------------------------------------- hats
def _hat(shot: Shot) -> None:
    template, beanie = shot.head.template, shot.factors.accessory == "beanie"
    edge = 7.60 if beanie else 7.66
    _shade_under_hat(shot, edge)
    cuff = 0.05 * smoothstep(7.98, 7.93, template[:, 1]) if beanie else 0.0
    height = 0.10 + 0.16 * smoothstep(7.7, 8.3, template[:, 1]) + cuff
    vertices = (shot.mesh + shot.normals * height[:, None]).astype(np.float32)
    seen = shot.draw(vertices, _hat_skin(), cull=True)
    points, normal, place = shot.attributes(seen, vertices, shot.normals, template)
    turn = np.arctan2(place[:, 0], place[:, 2] - np.float32(0.2))
    if beanie:
        pattern = 0.78 + 0.22 * np.sin(turn * 40) * smoothstep(8.45, 8.2, place[:, 1])
        pattern = pattern * (1 - 0.18 * smoothstep(0.02, 0.0, np.abs(place[:, 1] - 7.98)))
    else:
        pattern = 1 - 0.28 * smoothstep(0.06, 0.02, np.abs(np.sin(turn * 3)))
    inside = _inside_hat(place, edge)
    light = shot.lighting.surface(
        linear(_color(shot) * column(pattern)), normal, points, 0.9, 0.01, shadows=False
    )
    shot.canvas.paint(seen, light, kinds.HAT, edge_opacity(inside))
    if not beanie:
        _brim(shot)


def _inside_hat(place: Floats, edge: float) -> Floats:
    """Height above the edge of a hat (M,), in decimetres. The edge is lower at the back."""
    return place[:, 1] - edge + 0.22 * smoothstep(0.6, -0.6, place[:, 2])


def _shade_under_hat(shot: Shot, edge: float) -> None:
    """Darken forehead and hair below the edge of a hat."""
    vertices = (shot.mesh + shot.normals * np.float32(0.015)).astype(np.float32)
    seen = shot.draw(vertices, _hat_skin(), cull=True)
    alpha = 0.45 * smoothstep(-0.20, 0.0, _inside_hat(seen.interpolate(shot.head.template), edge))
    shot.canvas.paint(seen, np.zeros((len(seen), 3), np.float32), kinds.HAT, alpha, lift=0.05)


def _brim(shot: Shot) -> None:
    u, v = np.meshgrid(np.linspace(-1.05, 1.05, BRIM_TURNS), np.linspace(0, 1, BRIM_STEPS))
    front = shot.still[shot.head.nearest(0, 7.8, 1.5)]
    y = front[1] + 0.05 - 0.30 * v - 0.16 * np.sin(u) ** 2
    still = np.stack(
        [np.sin(u) * 0.82 * (1 + 0.12 * v), y, front[2] - 0.78 + np.cos(u) * (0.90 + 0.70 * v)], -1
    ).reshape(-1, 3)
    first = np.arange((BRIM_STEPS - 1) * BRIM_TURNS).reshape(BRIM_STEPS - 1, BRIM_TURNS)[:, :-1].ravel()
    lower = first + BRIM_TURNS
    triangles = np.concatenate(
        [np.stack([first, lower, lower + 1], 1), np.stack([first, lower + 1, first + 1], 1)]
    )
    seen, normal, points = shot.draw_solid(shot.pose(still.astype(np.float32)), triangles.astype(np.int32))
    albedo = np.broadcast_to(linear(_color(shot) * np.float32(0.72)), normal.shape)
    shot.canvas.paint(
        seen, shot.lighting.surface(albedo, normal, points, 0.8, 0.02, shadows=False), kinds.HAT
    )


# ------------------------------------------------------------------------------------------------------------- scarf
def _scarf(shot: Shot) -> None:
    template = shot.head.template
    height = 0.10 + 0.26 * np.exp(-(((template[:, 1] - 5.68) / 0.24) ** 2))
    out = shot.normals * np.array([1, 0.3, 1], np.float32)
    vertices = (shot.mesh + out * height[:, None]).astype(np.float32)
    seen = shot.draw(vertices, _neck_skin(), cull=True)
    points, normal, place = shot.attributes(seen, vertices, shot.normals, template)
    x, y, z = place[:, 0], place[:, 1], place[:, 2]
    fold = y * 15 + 2.2 * x
    normal = normalize(normal + np.stack([0 * x, 0.55 * np.cos(fold), 0 * x], 1))
    other = mix(_color(shot), np.array(CLOTHES["white"], np.float32), 0.55)
    band = smoothstep(0.15, 0.3, np.sin(x * 9 - 1.0))
    color = mix(_color(shot), other, column(0.7 * band)) * column(0.9 + 0.2 * look_up(grain(), x * 4, y * 4))
    light = shot.lighting.surface(linear(color), normal, points, 0.85, 0.01)
    lower, upper = y - 5.36 + 0.06 * np.sin(x * 7), 6.08 - 0.12 * smoothstep(0.2, 0.9, z) - y
    shot.canvas.paint(seen, light, kinds.SCARF, edge_opacity(np.minimum(lower, upper)))


WEAR: Mapping[str, Callable[[Shot], None]] = {
    "glasses": _glasses,
    "sunglasses": _glasses,
    "beanie": _hat,
    "cap": _hat,
    "scarf": _scarf,
}
