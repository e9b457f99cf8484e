"""Paints skin, clothes, eyes and the inside of the mouth."""

from __future__ import annotations

import functools

import numpy as np

from . import canvas as kinds
from .arrays import Floats, Ints, column, dot, linear, mix, normalize, power, smoothstep
from .factors import CLOTHES
from .head import AXIS, EYE, LOWER_TEETH, SKIN, TONGUE, load_head
from .identity import EYE_COLORS
from .mesh import above_neckline
from .noise import grain, look_up
from .shading import SKIN_WRAP, VIEW
from .shot import Shot
from .skin import SkinMap, skin_map

IRIS = 0.077  # decimetres of the template
PUPIL = 0.032
NECK = 6.6  # height of the template below which the plain skin is used beside the face
LIPS = {"woman": (0.92, 0.60, 0.58), "man": (0.90, 0.70, 0.67)}  # relative to the light of the skin
MOUTH_COLOR = (0.30, 0.11, 0.10)
GUM_COLOR, TEETH_COLOR = (0.66, 0.30, 0.30), (0.92, 0.89, 0.83)
MOUTH_DEEP, MOUTH_FRONT = 1.0, 1.42  # template z between which the inside of the mouth gets lighter


@functools.cache
def _mouth() -> Ints:
    head = load_head()
    return np.concatenate([head.teeth, head.tongue])


@functools.cache
def _attributes() -> Floats:
    """Vertex attributes (V, 6) of the surface: canonical coordinates (3), openness, lips, inside of the mouth."""
    head = load_head()
    inside = (head.mouth > 0.5) & (head.template[:, 1] > 6.2)
    return np.concatenate(
        [head.template, head.openness[:, None], head.lips[:, None], inside[:, None].astype(np.float32)], 1
    )


def draw_body(shot: Shot) -> None:
    """Paint skin, clothes and eyes, then teeth and tongue in an open mouth, then the lashes."""
    head = shot.head
    triangles = head.surface[shot.mesh[head.surface][:, :, 1].max(1) > -3.2]
    seen = shot.draw(shot.mesh, triangles, cull=True)
    values = seen.interpolate(np.concatenate([shot.mesh, shot.normals, _attributes()], 1))
    points, normal, place = values[:, :3], normalize(values[:, 3:6]), values[:, 6:9]
    openness, lips, inside = values[:, 9], values[:, 10], values[:, 11]
    part = head.kind[seen.corners[:, 0]]
    clothed = (part == SKIN) & (place[:, 1] < 6.2) & (above_neckline(place, shot.factors.collar) < 0)
    skin = skin_map(shot.person)
    albedo, lip = _skin_albedo(shot, skin, place, lips)
    hollow = smoothstep(0.4, 0.9, inside)
    albedo = mix(albedo, linear(MOUTH_COLOR), column(hollow))
    albedo = np.where(clothed[:, None], _cloth_albedo(shot, place), albedo)
    shade = np.where(inside > 0.5, 0.5 * openness, 0.28 + 0.80 * openness)
    rough = 0.6 + 0.8 * look_up(grain(), place[:, 0] * 3, place[:, 1] * 3)
    gloss = np.where(
        clothed,
        np.float32(0.008),
        (0.055 + 0.14 * lip * (0.5 + shot.person.look.lipstick)) * rough * (1 - hollow),
    )
    light = shot.lighting.surface(albedo, normal, points, shade, gloss, wrap=SKIN_WRAP)
    _paint_eyes(shot, light, part, place, normal, points, openness)
    kind = np.where(part == EYE, kinds.EYEBALL, np.where(clothed, kinds.CLOTHES, kinds.FACE)).astype(np.uint8)
    shot.canvas.paint(seen, light, kind)
    _open_mouth(shot, seen.pixel[inside > 0.45])
    _lashes(shot)


def _skin_albedo(shot: Shot, skin: SkinMap, place: Floats, lips: Floats) -> tuple[Floats, Floats]:
    """Return the albedo (M, 3) of the skin, in linear light, and the share of lip (M,), 0..1."""
    look, base = shot.person.look, skin.base
    albedo = skin(place)
    x, y, z = np.abs(place[:, 0]), place[:, 1], place[:, 2]
    neck = smoothstep(6.02, 5.92, y) + smoothstep(NECK + 0.05, NECK, y) * smoothstep(AXIS, AXIS - 0.1, z)
    albedo = mix(albedo, base, column(np.clip(neck, 0, 1)))
    ear = (x > 0.7) & (y < 7.4) & (y > 6.75) & (z > 0.3) & (z < 0.72)
    albedo[ear] = base * np.array([1.04, 0.88, 0.82], np.float32)
    depth = 1 - 0.15 * look.lips[0]
    natural = base * np.array(LIPS[shot.person.sex], np.float32) * np.float32(depth)
    paint = linear((0.52 + 0.30 * look.lips[1], 0.16 + 0.18 * look.lips[2], 0.20 + 0.18 * look.lips[0]))
    lip = smoothstep(0.25, 0.8, lips)
    return mix(albedo, mix(natural, paint, look.lipstick), column(lip)), lip


def _cloth_albedo(shot: Shot, place: Floats) -> Floats:
    """Return the albedo (M, 3) of the clothes, in linear light: a weave, and a darker seam at the collar."""
    color = np.array(CLOTHES[shot.factors.clothes], np.float32)
    weave = 0.94 + 0.12 * look_up(grain(), place[:, 0] * 2, place[:, 1] * 2)
    seam = smoothstep(-0.09, -0.07, above_neckline(place, shot.factors.collar))
    return linear(color * column(weave * (1 - 0.22 * seam)))


def _paint_eyes(
    shot: Shot,
    light: Floats,
    part: np.ndarray,
    place: Floats,
    normal: Floats,
    points: Floats,
    openness: Floats,
) -> None:
    """Paint the eyeballs into the light (M, 3) of the surface, in place."""
    color = np.array(EYE_COLORS[shot.person.look.eyes], np.float32)
    for k, center in enumerate(shot.head.eye_centers):
        eye = np.flatnonzero((part == EYE) & ((place[:, 0] > 0) == (k == 0)))
        if not len(eye):
            continue
        off = place[eye] - center
        radius = np.sqrt(off[:, 0] ** 2 + off[:, 1] ** 2) + (off[:, 2] < 0)
        fibers = 0.8 + 0.4 * look_up(grain(), np.arctan2(off[:, 1], off[:, 0]) * 3, radius * 2)
        iris = color * column(fibers * (1.25 - 0.65 * smoothstep(0.05, IRIS, radius)))
        iris = iris * column(smoothstep(PUPIL - 0.004, PUPIL + 0.004, radius))
        white = np.array([0.93, 0.91, 0.89], np.float32) * column(1 - 0.12 * smoothstep(0.09, 0.14, radius))
        albedo = linear(
            np.clip(mix(white, iris, column(smoothstep(IRIS + 0.005, IRIS - 0.004, radius))), 0, 1)
        )
        flat = normalize(normal[eye] * np.float32(0.6) + VIEW * np.float32(0.4))
        shaded = shot.lighting.surface(albedo, flat, points[eye], 0.5 + 0.5 * openness[eye], 0.0)
        lid = 1 - 0.42 * smoothstep(0.02, 0.085, off[:, 1])  # the upper lid's shadow
        half = np.clip(
            dot(normalize(normal[eye]), normalize(shot.lighting.sun * np.float32(0.7) + VIEW)), 0, 1
        )
        light[eye] = shaded * column(lid) + column(power(half, 128) * np.float32(1.1))


def _open_mouth(shot: Shot, gap: np.ndarray) -> None:
    """Paint teeth and tongue at the samples `gap` (K,), where the inside of the mouth is visible."""
    if not len(gap):
        return
    seen = shot.draw(shot.mesh, _mouth(), cull=True)
    hole = np.zeros(shot.camera.size**2, bool)
    hole[gap] = True
    points, normal, place = shot.attributes(seen, shot.mesh, shot.normals, shot.head.template)
    kind = shot.head.kind[seen.corners[:, 0]]
    tooth = column((kind != TONGUE).astype(np.float32))
    albedo = linear(mix(np.broadcast_to(np.array(GUM_COLOR, np.float32), normal.shape), TEETH_COLOR, tooth))
    front = smoothstep(MOUTH_DEEP, MOUTH_FRONT, place[:, 2])
    normal = normalize(normal * np.float32(0.4) + VIEW * np.float32(0.6))  # a row of teeth looks smooth
    light = shot.lighting.surface(albedo, normal, points, 0.25 + 0.65 * front, 0.04, shadows=False)
    beside = smoothstep(
        0.12, 0.28, np.abs(place[:, 0])
    )  # the lip shades the lower row, the cheeks shade its sides
    row = np.where(kind == LOWER_TEETH, 0.5 - 0.4 * beside, 1)
    light = light * column((0.3 + 0.55 * front) * row)
    alpha = np.where(hole[seen.pixel], np.float32(1), np.float32(0))
    shot.canvas.paint(seen, light, kinds.MOUTH, alpha, lift=0.08)


def _lashes(shot: Shot) -> None:
    seen = shot.draw(shot.mesh, shot.head.lashes)
    if not len(seen):
        return
    height = seen.interpolate(shot.head.template[:, 1:2])[:, 0]
    upper = 0.8 if shot.person.sex == "woman" else 0.5
    alpha = np.where(height > 7.285, np.float32(upper), np.float32(0.15))
    dark = np.full((len(seen), 3), 0.0006, np.float32)
    shot.canvas.paint(seen, dark, kinds.LASH, alpha, lift=0.02)
