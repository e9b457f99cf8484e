"""Changes of a diffusers UNet's own weights: what they add to the output of each layer, while the weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...mechanisms.deltas import Delta
from .injection import BlockHooks, Part


class DeltaPart(Part):
    """The changed layers of a block, by their path in it. They act in all rows."""

    hooked: tuple[str, ...] = ()  # type: ignore[misc]  # another for each block

    def __init__(self, block: BlockHooks, deltas: Mapping[str, Delta]):
        super().__init__(block)
        self._deltas = deltas
        self.hooked = tuple(deltas)

    def register(self) -> list[Any]:
        return [
            self.block.module.get_submodule(path).register_forward_hook(partial(self._add, path))
            for path in self._deltas
        ]

    def keep(self, x: Tensor | None) -> None:
        pass

    def _add(self, path: str, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        self.block.seen.add(path)
        call = self.block.call
        if call is None:
            return None
        strength = call.setting.strength
        if (
            isinstance(strength, Tensor) or strength == 0
        ):  # a tensor of strengths is refused where there are deltas
            return None
        given, delta = args[0], self._deltas[path]
        added = delta.apply(given.to(self.block.dtype(given, delta.weight)))
        return torch.add(output, added.to(output.dtype), alpha=strength)
