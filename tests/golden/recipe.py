"""Weights and inputs behind the golden files, made from their names alone.

Each tensor comes from NumPy's legacy Mersenne Twister, seeded with the CRC-32 of "seed/name". NumPy guarantees that
this stream never changes, so the golden files need to store outputs only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch


def draw(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 values that belong to this name."""
    generator = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))  # noqa: NPY002 (the frozen stream)
    return generator.standard_normal(tuple(shape)).astype(np.float32)


def weight(seed: int, name: str, shape: Sequence[int]) -> torch.Tensor:
    """A plausible trained tensor: matrices keep the variance, norms are close to the identity."""
    values = draw(seed, name, shape)
    if name.endswith("running_var"):
        values = 1 + 0.1 * np.abs(values)
    elif name.endswith("running_mean"):
        values = 0.1 * values
    elif name.endswith("bn3.weight"):
        # The last norm of a residual branch: small, or the sum over 49 blocks explodes.
        values = 0.2 + 0.02 * values
    elif len(shape) == 1 and name.endswith("weight"):
        values = 1 + 0.1 * values
    elif len(shape) == 1:
        values = 0.05 * values
    elif len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@torch.no_grad()
def fill(
    module: torch.nn.Module, seed: int, prefix: str = "", rename: Callable[[str], str] = lambda name: name
) -> None:
    """Set every floating point parameter and buffer to `weight(seed, rename(prefix + its name))`."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(weight(seed, rename(prefix + name), tensor.shape))


def value(seed: int, name: str, shape: Sequence[int]) -> torch.Tensor:
    """An input: standard normal values."""
    return torch.from_numpy(draw(seed, "input/" + name, shape))
