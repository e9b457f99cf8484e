"""Shading of skin, cloth and hair, with a lamp, its shadows and ambient light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Color, Floats, Ints, column, dot, linear, normalize, power, rounded, smoothstep, unit
from .factors import Light
from .noise import look_up, strands
from .raster import EMPTY, depth_map

SHADOW_SIDE = 208  # samples of the shadow map
SHADOW_SPAN = 5.2  # decimetres that it covers
SHADOW_TAPS = (
    (-0.9, -0.35), (0.35, -0.9), (0.9, 0.35), (-0.35, 0.9), (2.3, -0.9), (0.9, 2.3), (-2.3, 0.9), (-0.9, -2.3),
)  # fmt: skip
SHADOW_BIAS = 0.07  # decimetres
VIEW = unit(0, 0, 1)
KEY, AMBIENT, FILL, RIM = (
    0.78,
    0.52,
    0.17,
    0.10,
)  # strengths of the lamp, the ambient light, the light on the far side and at the rim
SKIN_WRAP: Color = (0.36, 0.22, 0.18)  # light spreads under the skin, red the farthest


@dataclass(frozen=True, eq=False)
class Lighting:
    """The light of one picture."""

    sun: Floats  # (3) direction of the lamp
    key: Floats  # (3)
    ambient: Floats  # (3)
    across: Floats  # (3) axes of the shadow map
    down: Floats
    nearest: Floats  # (SHADOW_SIDE, SHADOW_SIDE) depth towards the lamp

    @classmethod
    def of(cls, light: Light, casters: list[tuple[Floats, Ints]], backend: str | None) -> Lighting:
        """Make the light of a picture. `casters`: the meshes that cast shadows, as vertices (V, 3) and triangles (T, 3)."""
        azimuth, elevation = float(np.radians(light.azimuth)), float(np.radians(light.elevation))
        flat = np.cos(elevation)
        sun = normalize(
            rounded(np.array([np.sin(azimuth) * flat, np.sin(elevation), np.cos(azimuth) * flat]))
        )
        across = normalize(np.array([sun[2], 0, -sun[0]], np.float32))
        down = np.cross(sun, across).astype(np.float32)
        nearest = np.full((SHADOW_SIDE, SHADOW_SIDE), EMPTY, np.float32)
        lighting = cls(
            sun,
            KEY * np.array(light.key, np.float32),
            AMBIENT * np.array(light.ambient, np.float32),
            across,
            down,
            nearest,
        )
        for vertices, triangles in casters:
            points = lighting._from_lamp(vertices)
            np.maximum(nearest, depth_map(points, triangles, SHADOW_SIDE, backend=backend), out=nearest)
        return lighting

    def _from_lamp(self, points: Floats) -> Floats:
        scale, middle = np.float32(SHADOW_SIDE / SHADOW_SPAN), np.float32(SHADOW_SIDE / 2)
        lowered = points + np.array([0, 0.5, 0], np.float32)
        return np.stack(
            [
                dot(points, self.across) * scale + middle,
                dot(lowered, self.down) * scale + middle,
                dot(points, self.sun),
            ],
            -1,
        )

    def lit(self, points: Floats) -> Floats:
        """Share (M,), 0..1, of the lamp's light that reaches points (M, 3)."""
        place = self._from_lamp(points)
        total = np.zeros(len(points), np.float32)
        limit = place[:, 2] + np.float32(SHADOW_BIAS)
        for dx, dy in SHADOW_TAPS:
            x = np.clip(np.rint(place[:, 0] + np.float32(dx)).astype(np.int64), 0, SHADOW_SIDE - 1)
            y = np.clip(np.rint(place[:, 1] + np.float32(dy)).astype(np.int64), 0, SHADOW_SIDE - 1)
            total += self.nearest.ravel()[y * SHADOW_SIDE + x] < limit
        return total / len(SHADOW_TAPS)

    def surface(
        self,
        albedo: Floats,
        normal: Floats,
        points: Floats,
        openness: Floats | float = 0.9,
        gloss: Floats | float = 0.05,
        sharpness: int = 16,
        wrap: Color = (0.15, 0.15, 0.15),
        shadows: bool = True,
    ) -> Floats:
        """Return the linear light (M, 3) that surface points reflect.

        Args:
            albedo: (M, 3), linear.
            normal, points: (M, 3), unit vectors and positions in decimetres.
            openness: share of the ambient light (M,) that reaches the points.
            gloss, sharpness: strength of the highlight (M,), and its exponent, a power of two.
            wrap: how far the lamp's light extends into the shade, by colour.
            shadows: whether the surface receives cast shadows.
        """
        facing = dot(normal, self.sun)
        lit = self.lit(points + normal * np.float32(0.03)) if shadows else np.ones(len(points), np.float32)
        soft = np.array(wrap, np.float32)
        direct = np.clip((column(facing) + soft) / (1 + soft), 0, None)
        reach = column(lit) * (1 - soft * np.float32(0.5)) + soft * np.float32(0.5) * column(
            np.clip(facing + 0.5, 0, 1)
        )
        half = np.clip(dot(normal, normalize(self.sun + VIEW)), 0, 1)
        highlight = np.asarray(gloss, np.float32) * power(half, sharpness) * lit * (facing > 0)
        edge = np.clip(1 - np.clip(normal[:, 2], 0, 1), 0, 1)
        rim = (
            np.float32(RIM)
            * edge
            * edge
            * edge
            * np.clip(normal[:, 1] * np.float32(0.5) + np.float32(0.6), 0, 1)
        )
        fill = np.float32(FILL) * np.clip(dot(normal, unit(-float(self.sun[0]), 0.2, 0.8)), 0, 1)
        sky = column(np.float32(0.70) + np.float32(0.30) * normal[:, 1])
        open_ = np.asarray(openness, np.float32)
        open_ = column(open_) if open_.ndim else open_
        around = (self.ambient * sky + column(fill)) * open_
        return (
            albedo * (direct * reach * self.key + around)
            + column(highlight) * self.key
            + column(rim) * self.ambient * open_
        )

    def hair(
        self, color: Floats, normal: Floats, points: Floats, down: Floats, streaks: Floats, gloss: float = 1.0
    ) -> Floats:
        """Return the linear light (M, 3) that hair reflects, with a band of shine across the strands.

        Args:
            color: display values (3,) or (M, 3).
            normal, points: (M, 3), unit vectors and positions in decimetres.
            down: direction of the strands (M, 3).
            streaks: lighter and darker strands (M,), about -1..1.
            gloss: strength of the shine.
        """
        tangent = normalize(down - normal * column(dot(down, normal)))
        along = dot(tangent, normalize(self.sun + VIEW))
        band = power(np.clip(1 - along * along, 0, 1), 16)
        facing = np.clip((dot(normal, self.sun) + np.float32(0.35)) / np.float32(1.35), 0, 1)
        lit = self.lit(points + normal * np.float32(0.06))
        albedo = linear(np.clip(color * (1 + column(streaks)), 0.01, 1))
        direct = column(facing * (np.float32(0.35) + np.float32(0.65) * lit))
        shine = column(band * (np.float32(0.6) + np.clip(streaks, -0.6, 1)) * facing * lit) * (
            np.float32(0.035) + np.float32(0.42) * albedo + np.float32(0.06) * np.sqrt(albedo)
        )
        sky = column(np.float32(0.80) + np.float32(0.25) * normal[:, 1])
        return albedo * (
            direct * self.key * np.float32(1.15) + self.ambient * sky
        ) + shine * self.key * np.float32(gloss)


def strand_noise(across: Floats, along: Floats) -> Floats:
    """Noise of fine and coarse strands (M,), about -1..1, at coordinates (M,) in periods."""
    fine, coarse = (
        look_up(strands(), across, along),
        look_up(strands(), across * np.float32(0.37), along + 0.4),
    )
    return np.float32(0.42) * fine + np.float32(0.5) * coarse


def edge_opacity(cover: Floats) -> Floats:
    """Opacity (M,), 0..1, near the edge of a garment, from the distance inside the edge (M,) in decimetres."""
    return smoothstep(-0.01, 0.015, cover)
