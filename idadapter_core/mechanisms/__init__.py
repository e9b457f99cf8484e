"""Mechanisms by which an identity acts in a UNet: their modules and tensors, independent of host and method.

- `decoupled`: attention to identity tokens added to the text cross-attention, with keys and values of its own;
- `gated`: self-attention with extra tokens between a block's self-attention and cross-attention;
- `deltas`: changes of the UNet's own weights;
- `text`: tokens in the text encoder's output, or a word embedding in its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .decoupled import SiteProjections
from .deltas import Deltas
from .gated import GatedLayers
from .text import TextKind


@dataclass(frozen=True, eq=False)
class Mechanisms:
    """The mechanisms of one adapter."""

    decoupled: SiteProjections | None = None
    gated: GatedLayers | None = None
    deltas: Deltas = field(default_factory=dict)
    text: TextKind | None = None  # set by `adapter.build_adapter`, from the method
    openings: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """tanh of both gates of each gated adapter, by site number, as host-side floats."""

    @property
    def acts_in_unet(self) -> bool:
        """Whether any mechanism acts in the UNet."""
        return self.decoupled is not None or self.gated is not None or bool(self.deltas)


__all__ = ["Mechanisms"]
