"""Randomness as a function of what is drawn, not as a state that runs along.

Everything random about a sample (noise, timestep, what is dropped, which photos are its references) is drawn from a generator
seeded by the run's seed, the epoch and the sample. So a resumed run equals an unbroken one, and neither the number of loader
workers nor the number of processes changes anything: there is no state to lose or to share.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from a list of numbers and names; another list gives another seed."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that belongs to these parts, for example `generator(seed, epoch, sample, "noise")`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order (count,) in which an epoch goes through its samples."""
    return torch.randperm(count, generator=generator(seed, epoch, "order"))


def positions(seed: int, start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """(epoch, sample) for each position from `start` up to `stop`."""
    found = []
    for position in range(start, stop):
        epoch, offset = divmod(position, count)
        found.append((epoch, int(_order(seed, epoch, count)[offset])))
    return found


# A run asks again and again for parts of one epoch, whose order takes a tenth of a second for millions of samples.
_order = lru_cache(maxsize=2)(epoch_order)
