"""Share work among processes, on one machine or many, through a common folder and without a network.

Each process writes its part there, and rank 0 combines the parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ConfigError, InputError
from ..waiting import WAIT_TIMEOUT

POLL = 0.5
"""Seconds between polls for the others' progress."""


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's share of `count` items: consecutive and as even as possible."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"


ALONE = Ranks()


def ranks_of(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Rank and world size from RANK and WORLD_SIZE, as set by torchrun and others.

    Raises:
        ConfigError: their values are invalid.
    """
    given = {name: environ[name] for name in ("RANK", "WORLD_SIZE") if name in environ}
    if not given:
        return ALONE
    try:
        ranks = Ranks(int(given["RANK"]), int(given["WORLD_SIZE"]))
    except (KeyError, ValueError):
        ranks = Ranks(-1, 0)
    if not 0 <= ranks.rank < ranks.world:
        values = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"RANK must be a number from 0 and below WORLD_SIZE, got {values}. Set both, as torchrun does, or none of them."
        )
    return ranks


def wait_for(left: Callable[[], int], describe: Callable[[int], str], timeout: float = WAIT_TIMEOUT) -> None:
    """Wait until the other processes are done.

    Args:
        left: returns how many items they still have to do.
        describe: describes the remaining items for messages, given their number.

    Raises:
        InputError: no progress for `timeout` seconds.
    """
    before = left()
    since = time.monotonic()
    while before:
        time.sleep(POLL)
        now = left()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise InputError(
                f"no other process has done anything for {timeout:.0f} s: {describe(now)}. See why in the output of the other ranks, and give "
                "the same command to those that ended, or to all: they go on from where they were."
            )
