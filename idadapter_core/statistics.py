"""Means with intervals over people, and a recogniser's verification threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
FAR = 1e-3  # false acceptance rate of verification


@dataclass(frozen=True)
class Estimate:
    """A mean over images, with the 95 % bootstrap interval over people (drawn with replacement)."""

    mean: float
    low: float | None  # None if fewer than two people have a value: it says nothing about others
    high: float | None
    n: int  # number of images


def estimate(values: Sequence[float | None], people: Sequence[str], seed: int = 0) -> Estimate | None:
    """Mean of the existing values, with its interval; None without values.

    Images of one person are similar, so whole people are resampled, not images (a cluster bootstrap).

    Args:
        people: the person of each value.
        seed: of the resampling.
    """
    sums: dict[str, list[float]] = {}
    for value, person in zip(values, people, strict=True):
        if value is not None:
            sums.setdefault(person, []).append(float(value))
    if not sums:
        return None
    totals = np.array([sum(found) for found in sums.values()])
    counts = np.array([len(found) for found in sums.values()])
    mean, n = float(totals.sum() / counts.sum()), int(counts.sum())
    if len(totals) < 2:
        return Estimate(mean, None, None, n)
    drawn = np.random.default_rng(seed).integers(len(totals), size=(RESAMPLES, len(totals)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean, float(low), float(high), n)


def threshold_at(impostors: Sequence[float] | NDArray[np.floating], far: float = FAR) -> float | None:
    """The cosine exceeded by at most a share `far` of pairs of different people; None with fewer than 1 / far pairs."""
    if len(impostors) * far < 1:
        return None
    ordered = np.sort(np.asarray(impostors, np.float64))[::-1]
    return float(ordered[int(len(ordered) * far)])


def copy_of(
    generated: NDArray[np.floating], reference: NDArray[np.floating], other: NDArray[np.floating]
) -> float | None:
    """(theta(gen, other) - theta(gen, ref)) / theta(other, ref) of embeddings (512,), unit length (WithAnyone, MultiID-Bench).

    1 is the reference itself, -1 the other photo of the same person, 0 equally near to both. None if the two photos are equal.
    """
    apart = _angle(other, reference)
    return None if apart < 1e-3 else (_angle(generated, other) - _angle(generated, reference)) / apart


def _angle(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.arccos(np.clip(a @ b, -1, 1)))
