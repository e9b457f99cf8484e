"""Rasterises triangles with a depth buffer, in numpy, or faster in numba where it is installed. Both give the same bits.

Corners are first rounded to 1/256 sample, so which samples a triangle covers is decided in integers and does not depend on the platform.
The sample with the integer coordinates (x, y) lies at the point (x, y).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .arrays import Floats, Ints

SUBSAMPLES = (
    256  # grid that corners are rounded to; 2**8 keeps products of two edges of 2**12 samples far below 2**53
)
FAR = 1 << 14  # samples; corners farther out are clipped, so that products stay exact
BACKENDS = ("numpy", "numba")
EMPTY = -1e9  # depth where nothing was drawn

Filled = tuple[npt.NDArray[np.float64], Ints, npt.NDArray[np.float64]]
Fill = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float64], Ints, int], Filled]


@dataclass(frozen=True, eq=False)
class Fragments:
    """The front surface of a mesh at the M samples that it covers, row by row."""

    pixel: npt.NDArray[np.int64]  # (M,) y * size + x
    corners: Ints  # (M, 3) vertices of the triangle
    weights: Floats  # (M, 3) of the three corners; they sum to 1
    depth: Floats  # (M,) larger is nearer

    def __len__(self) -> int:
        return len(self.pixel)

    def select(self, chosen: npt.NDArray[np.bool_]) -> Fragments:
        """Return the fragments in the mask `chosen` (M,)."""
        return Fragments(self.pixel[chosen], self.corners[chosen], self.weights[chosen], self.depth[chosen])

    def interpolate(self, values: Floats) -> Floats:
        """Interpolate values (V, C) of the vertices at the fragments, to (M, C)."""
        a, b, c = self.corners.T
        weights = self.weights
        return (
            np.take(values, a, 0) * weights[:, :1]
            + np.take(values, b, 0) * weights[:, 1:2]
            + np.take(values, c, 0) * weights[:, 2:]
        )


def rasterize(
    points: Floats, triangles: Ints, size: int, *, cull: bool = False, backend: str | None = None
) -> Fragments:
    """Find the nearest triangle at every sample of a square picture.

    Args:
        points: (V, 3) x to the right and y down in samples, and depth, larger is nearer.
        triangles: (T, 3).
        size: samples along a side.
        cull: omit back faces (their corners run clockwise in the picture).
        backend: "numpy" or "numba"; None: numba where it is installed.
    """
    depth, index, weights = _filled(points, triangles, size, cull, backend)
    pixel = np.flatnonzero(index >= 0)
    u, v = weights[pixel].T
    return Fragments(
        pixel,
        triangles[index[pixel]],
        np.stack([1.0 - u - v, u, v], 1).astype(np.float32),
        depth[pixel].astype(np.float32),
    )


def depth_map(points: Floats, triangles: Ints, size: int, *, backend: str | None = None) -> Floats:
    """Return the depth (size, size) of the nearest triangle, `EMPTY` where there is none. Arguments as for `rasterize`."""
    return _filled(points, triangles, size, False, backend)[0].reshape(size, size).astype(np.float32)


def _filled(points: Floats, triangles: Ints, size: int, cull: bool, backend: str | None) -> Filled:
    scaled = np.rint(np.clip(points[:, :2], -FAR, FAR).astype(np.float64) * SUBSAMPLES).astype(np.int64)
    corners = scaled[triangles]  # (T, 3, 2)
    low, high = corners.min(1), corners.max(1)
    area = _area(corners)
    keep = (area < 0 if cull else area != 0) & (high >= 0).all(1) & (low <= (size - 1) * SUBSAMPLES).all(1)
    kept = np.flatnonzero(keep).astype(np.int32)
    fill = fill_for(backend)
    depth, index, weights = fill(corners[kept], points[:, 2].astype(np.float64)[triangles[kept]], kept, size)
    return depth, index, weights


def _area(corners: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    return (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])


def _fill_with_numpy(
    corners: npt.NDArray[np.int64], depths: npt.NDArray[np.float64], names: Ints, size: int
) -> Filled:
    low = np.maximum(-(-corners.min(1) // SUBSAMPLES), 0)
    high = np.minimum(corners.max(1) // SUBSAMPLES, size - 1)
    width, height = np.maximum(high - low + 1, 0).T
    count = width * height
    triangle = np.repeat(np.arange(len(corners)), count)
    place = np.arange(len(triangle)) - np.repeat(np.cumsum(count) - count, count)
    x = low[triangle, 0] + place % width[triangle]
    y = low[triangle, 1] + place // width[triangle]
    (x0, y0), (x1, y1), (x2, y2) = (corners[:, k].T for k in range(3))
    area = _area(corners)
    px, py = x * SUBSAMPLES - x0[triangle], y * SUBSAMPLES - y0[triangle]
    across = px * (y2 - y0)[triangle] - (x2 - x0)[triangle] * py
    along = (x1 - x0)[triangle] * py - px * (y1 - y0)[triangle]
    area = area[triangle]
    side = np.sign(area)
    inside = np.flatnonzero(
        (across * side >= 0) & (along * side >= 0) & ((area - across - along) * side >= 0)
    )
    inside = inside[::-1]  # the first of equal depths counts, and numpy keeps the last assignment
    triangle, area = triangle[inside], area[inside]
    u, v = across[inside] / area, along[inside] / area
    z = depths[triangle, 0] * (1.0 - u - v) + depths[triangle, 1] * u + depths[triangle, 2] * v
    order = np.argsort(z, kind="stable")
    pixel = (y[inside] * size + x[inside])[order]
    depth = np.full(size * size, EMPTY)
    index = np.full(size * size, -1, np.int32)
    weights = np.zeros((size * size, 2))
    depth[pixel] = z[order]
    index[pixel] = names[triangle[order]]
    weights[pixel] = np.stack([u, v], 1)[order]
    return depth, index, weights


def _fill_in_loops(
    corners: npt.NDArray[np.int64], depths: npt.NDArray[np.float64], names: Ints, size: int
) -> Filled:
    depth = np.full(size * size, EMPTY)
    index = np.full(size * size, -1, np.int32)
    weights = np.zeros((size * size, 2))
    for t in range(len(corners)):
        x0, y0 = corners[t, 0, 0], corners[t, 0, 1]
        x1, y1 = corners[t, 1, 0], corners[t, 1, 1]
        x2, y2 = corners[t, 2, 0], corners[t, 2, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        side = 1 if area > 0 else -1
        left, right = min(x0, x1, x2), max(x0, x1, x2)
        top, bottom = min(y0, y1, y2), max(y0, y1, y2)
        for y in range(max(-(-top // SUBSAMPLES), 0), min(bottom // SUBSAMPLES, size - 1) + 1):
            for x in range(max(-(-left // SUBSAMPLES), 0), min(right // SUBSAMPLES, size - 1) + 1):
                px, py = x * SUBSAMPLES - x0, y * SUBSAMPLES - y0
                across = px * (y2 - y0) - (x2 - x0) * py
                along = (x1 - x0) * py - px * (y1 - y0)
                if across * side < 0 or along * side < 0 or (area - across - along) * side < 0:
                    continue
                u, v = across / area, along / area
                z = depths[t, 0] * (1.0 - u - v) + depths[t, 1] * u + depths[t, 2] * v
                pixel = y * size + x
                if z > depth[pixel]:
                    depth[pixel] = z
                    index[pixel] = names[t]
                    weights[pixel, 0] = u
                    weights[pixel, 1] = v
    return depth, index, weights


@functools.cache
def _compiled() -> Fill | None:
    try:
        import numba
    except ImportError:
        return None
    # Without fastmath: reordered or fused operations would give other bits than numpy.
    compiled: Any = numba.njit(_fill_in_loops)
    return compiled


def fill_for(backend: str | None) -> Fill:
    """Return the fill function of a backend; see `rasterize`.

    Raises:
        InputError: the backend is unknown, or numba is not installed.
    """
    if backend not in (None, *BACKENDS):
        raise InputError(f"there is no renderer {backend!r}; choose one of: {', '.join(BACKENDS)}.")
    if backend == "numpy":
        return _fill_with_numpy
    compiled = _compiled()
    if backend == "numba" and compiled is None:
        raise InputError(
            "numba is not installed: pip install numba, or use the backend numpy, which gives the same pixels."
        )
    return compiled or _fill_with_numpy
