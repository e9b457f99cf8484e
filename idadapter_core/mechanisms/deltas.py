"""Weight deltas of an adapter for any linear layer in the UNet's transformer blocks, full or low-rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Place(NamedTuple):
    """A linear layer inside the transformer block of a cross-attention site."""

    site: int  # number in checkpoints
    layer: str  # path inside the block: "attn1.to_q", "attn2.to_v", "attn2.to_out.0"


@dataclass(frozen=True, eq=False)
class FullDelta:
    """W + strength * weight. The layer owns the weight, which is read from it on each use."""

    layer: nn.Linear  # in -> out, without bias

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        return self.layer.weight

    def is_nonzero(self) -> bool:
        """Return whether the delta is not zero."""
        return bool(self.weight.any())

    def apply(self, x: Tensor) -> Tensor:
        """Return the addition to the layer's output for an input x (..., in), in the dtype of x."""
        return F.linear(x, self.weight)


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """W + strength * scale * up @ down (LoRA, arXiv 2106.09685)."""

    up_layer: nn.Linear  # rank -> out, without bias
    down_layer: nn.Linear  # in -> rank, without bias
    scale: float = 1.0

    @property
    def up(self) -> Tensor:
        """(out, rank)."""
        return self.up_layer.weight

    @property
    def down(self) -> Tensor:
        """(rank, in)."""
        return self.down_layer.weight

    @property
    def weight(self) -> Tensor:
        """A weight with the dtype and device of the delta, for hosts."""
        return self.up

    def is_nonzero(self) -> bool:
        """Return whether the delta is not zero."""
        return self.scale != 0 and bool(self.up.any()) and bool(self.down.any())

    def apply(self, x: Tensor) -> Tensor:
        """Return the addition to the layer's output for an input x (..., in), in the dtype of x."""
        added = F.linear(F.linear(x, self.down), self.up)
        return added if self.scale == 1 else added * self.scale


Delta = FullDelta | LowRankDelta
Deltas = Mapping[Place, Delta]


def nonzero_deltas(deltas: Deltas) -> dict[Place, Delta]:
    """Return the deltas that are not zero."""
    return {place: delta for place, delta in deltas.items() if delta.is_nonzero()}
