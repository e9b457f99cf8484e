"""Removes channels that are zero in every picture from a TAESD, whose layers have a fixed width.

A small autoencoder in a TAESD's file is filled up with zeros. Without them it computes the same numbers, several times faster.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def without_zero_channels(layers: nn.Sequential) -> nn.Sequential:
    """Return the same function of images without channels that are always zero, or `layers` itself if there are none.

    Args:
        layers: convolutions, ReLUs, upsampling, and residual blocks with the parts `conv`, `skip` and `fuse`, as in TAESD.
    """
    places = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    if not places:
        return layers
    kept = [layers[number] for number in range(places[0])]
    first: Any = layers[places[0]]
    alive = torch.arange(first.in_channels)
    for number in range(places[0], len(layers)):
        found = _narrowed(layers[number], alive, is_last=number == places[-1])
        if found is None:
            return layers
        narrow, alive = found
        kept.append(narrow)
    changed = any(new is not old for new, old in zip(kept, layers, strict=True))
    return nn.Sequential(*kept) if changed else layers


def _narrowed(layer: nn.Module, alive: Tensor, is_last: bool) -> tuple[nn.Module, Tensor] | None:
    """The layer for the channels `alive` of its input, and the channels that its output has. None for an unknown layer."""
    if isinstance(layer, nn.Conv2d):
        return _narrow_conv(
            layer, alive, torch.arange(layer.out_channels) if is_last else _nonzero(layer, alive)
        )
    if isinstance(layer, nn.ReLU | nn.Upsample | nn.Identity):
        return layer, alive
    if (
        not all(hasattr(layer, part) for part in ("conv", "skip", "fuse"))
        or getattr(layer, "pool", None) is not None
    ):
        return None
    block: Any = layer
    convs = [part for part in block.conv if isinstance(part, nn.Conv2d)]
    channels = [alive]
    for conv in convs:
        channels.append(_nonzero(conv, channels[-1], least=0 if conv is convs[-1] else 1))
    if not isinstance(block.skip, nn.Identity) or not set(channels[-1].tolist()) <= set(alive.tolist()):
        return None
    if not len(channels[-1]):
        return block.fuse, alive  # nothing is added
    channels[-1] = alive
    if all(len(found) == conv.out_channels for conv, found in zip(convs, channels[1:], strict=True)):
        return layer, alive
    narrow: Any = copy.deepcopy(block)
    widths = iter(zip(channels, channels[1:], strict=False))
    narrow.conv = nn.Sequential(
        *(_narrow_conv(part, *next(widths))[0] if part in convs else part for part in block.conv)
    )
    return narrow, alive


def _nonzero(conv: nn.Conv2d, alive: Tensor, least: int = 1) -> Tensor:
    """Channels of a convolution's output that are not zero for every input; at least `least` channels."""
    used = conv.weight[:, alive].flatten(1).any(1)
    found = (used if conv.bias is None else used | (conv.bias != 0)).nonzero()[:, 0]
    return found if len(found) >= least else torch.arange(least)


def _narrow_conv(conv: nn.Conv2d, alive: Tensor, outputs: Tensor) -> tuple[nn.Module, Tensor]:
    if len(alive) == conv.in_channels and len(outputs) == conv.out_channels:
        return conv, outputs
    narrow = copy.deepcopy(conv)  # also of a subclass
    narrow.in_channels, narrow.out_channels = len(alive), len(outputs)
    narrow.weight = nn.Parameter(conv.weight.detach()[outputs][:, alive].clone(), conv.weight.requires_grad)
    if conv.bias is not None:
        narrow.bias = nn.Parameter(conv.bias.detach()[outputs].clone(), conv.bias.requires_grad)
    return narrow, outputs
