"""Small array functions shared by the renderer.

They use no matrix products: the last bits of those depend on the number of rows and on threads, and pictures must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int32]
Color = tuple[float, float, float]  # red, green, blue, 0..1; display values unless noted as light


def smoothstep(start: float, end: float, x: Floats) -> Floats:
    """Interpolate smoothly from 0 at `start` to 1 at `end`, constant outside. `start` may be the larger one."""
    t = np.clip((x - np.float32(start)) * np.float32(1.0 / (end - start)), 0, 1)
    return t * t * (3 - 2 * t)


def dot(a: Floats, b: Floats | Sequence[float]) -> Floats:
    """Dot products (...) of vectors a (..., 3) and b (3,) or (..., 3)."""
    b = np.asarray(b, np.float32)
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def normalize(vectors: Floats) -> Floats:
    """Scale vectors (..., 3) to length 1."""
    return vectors / (np.sqrt(dot(vectors, vectors)) + np.float32(1e-8))[..., None]


def rotate(points: Floats, matrix: Floats) -> Floats:
    """Multiply points (..., 3) by a rotation matrix (3, 3)."""
    return np.stack([dot(points, row) for row in matrix], -1)


def unit(x: float, y: float, z: float) -> Floats:
    """The unit vector (3,) in the direction (x, y, z)."""
    return normalize(np.array([x, y, z], np.float32))


def rounded(values: Floats) -> Floats:
    """Round to 5 decimals, which drops the last bits of sines and powers: they differ between platforms."""
    return np.round(values.astype(np.float64), 5).astype(np.float32)


def column(values: Floats) -> Floats:
    """Reshape (M,) to (M, 1), for products with colours (M, 3)."""
    return values[:, None]


def power(x: Floats, exponent: int) -> Floats:
    """Raise x to an exponent that is a power of two, by repeated squaring: the same bits on every platform."""
    assert exponent & (exponent - 1) == 0
    while exponent > 1:
        x = x * x
        exponent //= 2
    return x


def mix(a: Floats, b: Floats | Sequence[float], share: Floats | float) -> Floats:
    """Interpolate linearly from a (share 0) to b (share 1)."""
    return a + (np.asarray(b, np.float32) - a) * np.asarray(share, np.float32)


def linear(color: Floats | Sequence[float]) -> Floats:
    """Convert display values to linear light. The display curve is taken as a square, which is exact on every platform."""
    values = np.asarray(color, np.float32)
    return values * values


def screen(light: Floats) -> Floats:
    """Convert linear light to display values, 0..1: the inverse of `linear`, with compressed highlights."""
    light = np.clip(light, 0, None)
    return np.sqrt(np.clip(light * (1 + light * np.float32(0.10)) / (1 + light * np.float32(0.30)), 0, 1))


def normals(vertices: Floats, triangles: Ints) -> Floats:
    """Vertex normals (..., V, 3), of length 1, of meshes (..., V, 3) that share triangles (T, 3)."""
    meshes = vertices.reshape(-1, *vertices.shape[-2:])
    sides = np.stack([_summed_normals(mesh, triangles) for mesh in meshes])
    return normalize(sides).reshape(vertices.shape)


def _summed_normals(mesh: Floats, triangles: Ints) -> Floats:
    a, b, c = (mesh[triangles[:, k]] for k in range(3))
    p, q = b - a, c - a
    face = (
        p[:, 1] * q[:, 2] - p[:, 2] * q[:, 1],
        p[:, 2] * q[:, 0] - p[:, 0] * q[:, 2],
        p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0],
    )
    corners = triangles.ravel()
    return np.stack([np.bincount(corners, np.repeat(part, 3), len(mesh)) for part in face], 1).astype(
        np.float32
    )


def blur(image: Floats, sigma: float) -> Floats:
    """Gaussian blur of an image (H, W) or (H, W, C); `sigma` in pixels. Pixels of the border are repeated outwards."""
    reach = max(1, round(2.5 * sigma))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        image = _slide(image, kernel, axis, "edge")
    return image


def smear(image: Floats, sigma: float, axis: int) -> Floats:
    """Gaussian blur along one axis, which is periodic; `sigma` in pixels."""
    reach = max(1, round(2.5 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return _slide(image, (kernel / kernel.sum()).astype(np.float32), axis, "wrap")


def box_mean(image: Floats, width: int) -> Floats:
    """Mean of the square of odd side `width` around each pixel. Pixels of the border are repeated outwards."""
    kernel = np.full(width, 1 / width, np.float32)
    return _slide(_slide(image, kernel, 0, "edge"), kernel, 1, "edge")


def _slide(image: Floats, kernel: Floats, axis: int, border: str) -> Floats:
    reach = len(kernel) // 2
    pad = [(0, 0)] * image.ndim
    pad[axis] = (reach, reach)
    padded = np.pad(image, pad, mode=border)  # type: ignore[call-overload]
    length = image.shape[axis]
    total = np.zeros_like(image, dtype=np.float32)
    for k, weight in enumerate(kernel):
        part = padded[k : k + length] if axis == 0 else padded[:, k : k + length]
        total += weight * part
    return total


def slope(image: Floats) -> Floats:
    """Gradient magnitude (H, W) of an image (H, W), by Sobel filters."""
    p = np.pad(image, 1, mode="edge")
    across = p[:-2, 2:] - p[:-2, :-2] + 2 * (p[1:-1, 2:] - p[1:-1, :-2]) + p[2:, 2:] - p[2:, :-2]
    down = p[2:, :-2] - p[:-2, :-2] + 2 * (p[2:, 1:-1] - p[:-2, 1:-1]) + p[2:, 2:] - p[:-2, 2:]
    return np.sqrt(across * across + down * down)


def reduce(image: Floats, factor: int) -> Floats:
    """Downscale an image (H, W) or (H, W, C) by an integer: each pixel is the mean of `factor` × `factor` pixels."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    parts = [image[i::factor, k::factor] for i in range(factor) for k in range(factor)]
    total = np.zeros((height, width, *image.shape[2:]), np.float32)
    for part in parts:
        total += part
    return total / np.float32(factor * factor)
