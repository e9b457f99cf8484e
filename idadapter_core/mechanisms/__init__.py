"""How an identity acts in a UNet: the modules and tensors of each way, without a host and without a method.

- `decoupled`: tokens with keys and values of their own beside the text's, in cross-attention;
- `gated`: self-attention with extra tokens between a block's two attentions;
- `deltas`: changes of the UNet's own weights;
- `text`: tokens in the text encoder's output, or a word in its input.
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
    """The parts of one adapter."""

    decoupled: SiteProjections | None = None
    gated: GatedLayers | None = None
    deltas: Deltas = field(default_factory=dict)
    text: TextKind | None = None  # set by `adapter.build_adapter`, from the method
    openings: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """tanh of both gates of each gated adapter by site number, known on the host."""

    @property
    def acts_in_unet(self) -> bool:
        """Whether there is anything that can act in a UNet."""
        return self.decoupled is not None or self.gated is not None or bool(self.deltas)


__all__ = ["Mechanisms"]
