"""What acts in one model call, decided once on the host before the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...idadapter_core import Adapter
from .plan import KEY
from .run import Row, Run

CALL = f"{KEY}_call"  # in transformer_options, during one model call


@dataclass(frozen=True, eq=False)
class Acting:
    """One application in one model call."""

    number: int  # in the plan
    strength: float
    scale: Tensor  # the strength, 0-d, on the device
    masked: bool


@dataclass(frozen=True, eq=False)
class Call:
    """What the patches of one model call need."""

    run: Run
    rows: tuple[Row, ...]
    acting: tuple[Acting, ...]  # in cross-attention
    gated: tuple[Acting, ...]  # between self-attention and cross-attention
    normalized: bool
    gates_normalized: bool
    foreign_scale: Tensor | None  # not None: rescale what other packs' replacements add
    gates: Mapping[Adapter, Any] = field(default_factory=dict)  # the gated layers where this call runs
    owns_stream: bool = False  # no other pack has a middle patch that could still hold the image tokens
