"""The applications that act in one model call, chosen once on the host before the model runs."""

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
class ActiveApplication:
    """One application in one model call."""

    number: int  # in the plan
    strength: float  # a factor; with rescaling, a multiple of the base norm
    at_most: float | None  # largest factor when rescaling only limits, else None
    scale: Tensor  # the strength, 0-d, on the device
    masked: bool


@dataclass(frozen=True, eq=False)
class Call:
    """Everything the patches need to know about one model call."""

    run: Run
    rows: tuple[Row, ...]
    decoupled: tuple[ActiveApplication, ...]  # in cross-attention
    gated: tuple[ActiveApplication, ...]  # between self-attention and cross-attention
    normalized: bool
    gates_normalized: bool
    foreign_scale: Scale | None  # rescales the additions of other packs' replacements; None leaves them alone
    latent_size: tuple[int, int]  # of this call's input
    gates: Mapping[Adapter, GatedLayers] = field(
        default_factory=dict
    )  # the gated layers on the device of this call
    owns_stream: bool = False  # no other pack has a middle patch that may still reference the image tokens
    self_norm: list[Tensor] = field(default_factory=list)  # norm per row of the latest self-attention output


_current = threading.local()


@contextlib.contextmanager
def calling(call: Call) -> Iterator[None]:
    """Make `call` the current call of this thread, for `call_of`."""
    before = getattr(_current, "call", None)
    _current.call = call
    try:
        yield
    finally:
        _current.call = before


def call_of(extra: Mapping[str, Any]) -> Call | None:
    """Return the model call that a block belongs to, even if another node's copy of the block drops our options."""
    call: Call | None = extra.get(CALL) or getattr(_current, "call", None)
    return call
