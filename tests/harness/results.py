"""What came out of a run: pictures as arrays, and texts."""

from __future__ import annotations

import numpy as np

from tests.harness.server import RunResult


def picture(result: RunResult) -> np.ndarray:
    """The one saved picture of a run, (H, W, 3)."""
    (image,) = result.check().images
    assert image.format == "PNG"
    return np.asarray(image, dtype=np.int16)


def pictures(result: RunResult) -> list[np.ndarray]:
    return [np.asarray(image, dtype=np.int16) for image in result.check().images]


def text_of(result: RunResult, node: str) -> str:
    """What a `PreviewAny` showed."""
    return "".join(result.outputs[node]["text"])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two pictures, in levels of 255."""
    return float(np.abs(one - other).mean())


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of two pictures, in levels of 255."""
    return int(np.abs(one - other).max())
