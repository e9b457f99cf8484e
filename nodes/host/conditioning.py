"""Entries that this pack adds to the options of a CONDITIONING."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...idadapter_core import Identity
from .plan import KEY

ATTACHED = f"{KEY}_attached"  # tuple of `Attached`: the identities attached to it
PROMPTED = f"{KEY}_prompted"  # `Prompted`: the ID Prompt that made it
TEXT_POSITIONS = f"{KEY}_text"  # contiguous positions of its identity text tokens


@dataclass(frozen=True, eq=False)
class Attached:
    """One identity added by Attach Identity to Conditioning."""

    identity: Identity
    role: str  # positive or negative
    node_id: str | None = None

    @property
    def negative(self) -> bool:
        return self.role == "negative"

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return self


@dataclass(frozen=True)
class Prompted:
    """The ID Prompt that made a conditioning, and its adapter."""

    adapter: str  # digest
    node_id: str


def attached_to(options: Mapping[str, Any]) -> tuple[Attached, ...]:
    """Return the identities attached to a conditioning."""
    attached: tuple[Attached, ...] = options.get(ATTACHED, ())
    return attached


def is_negative(role: str) -> bool:
    """Return whether a guider's role uses the unconditional counterpart of the identity."""
    return "negative" in role
