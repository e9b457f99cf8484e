"""Stateless randomness: every draw is a function of its purpose.

All random choices for a sample (noise, timestep, dropping, reference photos) come from a generator seeded with the run's seed, the
epoch and the sample. So a resumed run equals an uninterrupted one, and the numbers of loader workers and processes have no effect:
there is no state to lose or share.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """Derive a 63-bit seed from a list of numbers and names; different lists give different seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with these parts, for example `generator(seed, epoch, sample, "noise")`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order (count,) of the samples in an epoch."""
    return torch.randperm(count, generator=generator(seed, epoch, "order"))


def positions(seed: int, start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """Return (epoch, sample) for each position from `start` up to `stop`."""
    found = []
    for position in range(start, stop):
        epoch, offset = divmod(position, count)
        found.append((epoch, int(_order(seed, epoch, count)[offset])))
    return found


# A run reads one epoch in many parts, and computing the order of millions of samples takes a tenth of a second.
_order = lru_cache(maxsize=2)(epoch_order)
