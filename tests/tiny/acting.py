"""Adapters that act as if they were trained."""

from __future__ import annotations

import torch

from idadapter_core.adapter import Adapter
from idadapter_core.training.adapters import to_adapter, trainable


def acting(adapter: Adapter) -> Adapter:
    """The adapter with random numbers added to all of its weights: gates are open, K/V changed, tokens not 0."""
    state = {}
    for number, (name, parameter) in enumerate(trainable(adapter).items()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        scale = 0.3 if parameter.ndim < 2 else 0.5 * parameter.shape[-1] ** -0.5
        state[name] = parameter.detach() + scale * drawn
    return to_adapter(adapter, state, adapter.name)
