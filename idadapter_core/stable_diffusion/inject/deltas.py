"""Weight deltas in a diffusers UNet, added to the output of each layer; the weights themselves do not change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...mechanisms.deltas import Delta
from .injection import BlockHooks, Part


class DeltaPart(Part):
    """Hooks on the layers of a block that have deltas, by path in the block. Deltas act in all rows."""

    hooked: tuple[str, ...] = ()  # type: ignore[misc]  # differs between blocks

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
        ):  # adapters with deltas do not accept a tensor of strengths
            return None
        given, delta = args[0], self._deltas[path]
        added = delta.apply(given.to(self.block.dtype(given, delta.weight)))
        return torch.add(output, added.to(output.dtype), alpha=strength)
