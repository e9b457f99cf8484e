"""Seamlessly repeating tables of noise: blotches, grain and strands. They are computed once and are always the same."""

from __future__ import annotations

import functools

import numpy as np

from .arrays import Floats, smear

SIDE = 256  # samples along a side of a table; a power of two, so that indices wrap by a mask


def _blurred(rng: np.random.Generator, sigma: float) -> Floats:
    white = rng.standard_normal((SIDE, SIDE)).astype(np.float32)
    return white if sigma < 0.3 else smear(smear(white, sigma, 0), sigma, 1)


def _fractal(seed: int, octaves: int, persistence: float) -> Floats:
    rng = np.random.default_rng(seed)
    total = np.zeros((SIDE, SIDE), np.float32)
    for octave in range(octaves):
        sigma = SIDE / 8 / 2**octave
        total += np.float32(persistence**octave * sigma) * _blurred(rng, sigma)
    return (total - total.min()) / np.ptp(total)


@functools.cache
def blotches() -> Floats:
    """Table (256, 256) of soft noise, 0..1."""
    return _fractal(1, 5, 0.55)


@functools.cache
def grain() -> Floats:
    """Table (256, 256) of rough noise, 0..1."""
    return _fractal(2, 6, 0.95)


@functools.cache
def strands() -> Floats:
    """Table (256, 256) of noise stretched along the second axis, with mean 0 and standard deviation 1."""
    rng = np.random.default_rng(3)
    fine = smear(rng.standard_normal((SIDE, SIDE)).astype(np.float32), 20, 1)
    coarse = smear(smear(rng.standard_normal((SIDE, SIDE)).astype(np.float32), 28, 1), 2.5, 0)
    total = fine / fine.std() + coarse / coarse.std()
    return (total / total.std()).astype(np.float32)


def look_up(table: Floats, across: Floats, along: Floats) -> Floats:
    """Return the values of a table at coordinates in periods: tables repeat after 1."""
    mask = SIDE - 1
    rows = np.floor(across * SIDE).astype(np.int64) & mask
    columns = np.floor(along * SIDE).astype(np.int64) & mask
    return table.ravel()[rows * SIDE + columns]
