"""Shared helpers of the methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def head_width(*widths: int) -> int:
    """Return the width of an attention head: 64, or the largest smaller power of two that divides all widths."""
    return next(size for size in (64, 32, 16, 8, 4, 2, 1) if all(width % size == 0 for width in widths))


def resized_shallow(stages: Sequence[Tensor], side: int) -> list[Tensor]:
    """Resize all stage maps (B, C, h, w) of a face network but the deepest to (B, C, side, side), bilinearly; a second time changes nothing."""
    *shallow, deep = stages
    size = (side, side)
    return [*(F.interpolate(s, size=size, mode="bilinear", align_corners=False) for s in shallow), deep]


@torch.no_grad()
def draw_usual(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise the linear layers and norms of a module, in order, with PyTorch's default distributions.

    Values are drawn in fp32, one parameter after the other, and rounded to the dtype of the parameters.
    """
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                drawn = torch.empty(parameter.shape)
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))
