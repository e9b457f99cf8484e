"""What acts in one model call, decided once on the host before the model runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...idadapter_core import Adapter
from ...idadapter_core.mechanisms.gated import GatedLayers
from .foreign import Scale
from .plan import KEY
from .rows import Row
from .run import Run

CALL = f"{KEY}_call"  # in transformer_options, during one model call


@dataclass(frozen=True, eq=False)
class Acting:
    """One application in one model call."""

    number: int  # in the plan
    strength: float  # a factor, or where rescaled a multiple of the length that it is measured against
    at_most: float | None  # the largest factor, where rescaling only limits
    scale: Tensor  # the strength, 0-d, on the device
    masked: bool


@dataclass(frozen=True, eq=False)
class Call:
    """What the patches of one model call need."""

    run: Run
    rows: tuple[Row, ...]
    decoupled: tuple[Acting, ...]  # in cross-attention
    gated: tuple[Acting, ...]  # between self-attention and cross-attention
    normalized: bool
    gates_normalized: bool
    foreign_scale: Scale | None  # not None: rescale what other packs' replacements add
    latent_size: tuple[int, int]  # of this call's input
    gates: Mapping[Adapter, GatedLayers] = field(
        default_factory=dict
    )  # the gated layers where this call runs
    owns_stream: bool = False  # no other pack has a middle patch that could still hold the image tokens
    self_norm: list[Tensor] = field(default_factory=list)  # of the latest self-attention's output, per row


_current = threading.local()


@contextlib.contextmanager
def calling(call: Call) -> Iterator[None]:
    """Make a call the one that `call_of` finds in this thread."""
    before = getattr(_current, "call", None)
    _current.call = call
    try:
        yield
    finally:
        _current.call = before


def call_of(extra: Mapping[str, Any]) -> Call | None:
    """The model call that a block belongs to, also where another node's copy of the block passes on none of our options."""
    call: Call | None = extra.get(CALL) or getattr(_current, "call", None)
    return call
