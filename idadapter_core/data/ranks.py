"""Several processes, on one machine or many, that share a piece of work and see the same folder. No network is between them: each
writes its part there, and the one of rank 0 puts the parts together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ConfigError, InputError
from ..waiting import PATIENCE

POLL = 0.5
"""Seconds between two looks at what others have done."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The part of so many things that is this process's: the parts follow each other and are as even as can be."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"


ALONE = Ranks()


def ranks_of(environ: Mapping[str, str] = os.environ) -> Ranks:
    """As torchrun and others tell it, in RANK and WORLD_SIZE.

    Raises:
        ConfigError: they make no sense.
    """
    given = {name: environ[name] for name in ("RANK", "WORLD_SIZE") if name in environ}
    if not given:
        return ALONE
    try:
        ranks = Ranks(int(given["RANK"]), int(given["WORLD_SIZE"]))
    except (KeyError, ValueError):
        ranks = Ranks(-1, 0)
    if not 0 <= ranks.rank < ranks.world:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"RANK must be a number from 0 and below WORLD_SIZE, got {told}. Set both, as torchrun does, or none of them."
        )
    return ranks


def wait_for(left: Callable[[], int], say: Callable[[int], str], patience: float = PATIENCE) -> None:
    """Wait until others have done everything.

    Args:
        left: looks at what they did, and says how many things they have still to do.
        say: what is waited for, in words, of so many things.

    Raises:
        InputError: nothing was done for `patience` seconds.
    """
    before = left()
    since = time.monotonic()
    while before:
        time.sleep(POLL)
        now = left()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            raise InputError(
                f"no other process has done anything for {patience:.0f} s: {say(now)}. See why in the output of the other ranks, and give "
                "the same command to those that ended, or to all: they go on from where they were."
            )
