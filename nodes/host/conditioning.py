"""What the pack leaves in a CONDITIONING beside ComfyUI's own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...idadapter_core import Identity
from .plan import KEY

ATTACHED = f"{KEY}_attached"  # identities of its own, a tuple of `Attached`
PROMPTED = f"{KEY}_prompted"  # the ID Prompt that made it, a `Prompted`
TEXT_POSITIONS = f"{KEY}_text"  # the neighbouring positions of its identity text tokens


@dataclass(frozen=True, eq=False)
class Attached:
    """One identity that Attach Identity to Conditioning has put there."""

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
    """Which ID Prompt made a conditioning, and for which adapter."""

    adapter: str  # digest
    node_id: str


def attached_to(options: Mapping[str, Any]) -> tuple[Attached, ...]:
    """The identities attached to a conditioning."""
    attached: tuple[Attached, ...] = options.get(ATTACHED, ())
    return attached


def is_negative(role: str) -> bool:
    """Whether a guider's role takes the identity's unconditional counterpart."""
    return "negative" in role
