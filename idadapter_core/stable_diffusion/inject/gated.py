"""Gated layers in a diffusers UNet.

In each transformer block x is the block's input, n the output of its self-attention, and y = x + n. A hook changes the
self-attention output to n + r, where r is the gated residual at y, so the block continues with Eq. 7 of arXiv 2403.13535.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...mechanisms.gated import GatedLayers, GateIdentity
from .injection import BlockHooks, Group, Part, Setting


class GatedPart(Part):
    """Hook for a gated adapter between self-attention and cross-attention."""

    hooked = ("attn1",)

    def __init__(self, block: BlockHooks, layers: GatedLayers):
        super().__init__(block)
        self._gate = layers.at(block.index)
        self._x: Tensor | None = None

    def register(self) -> list[Any]:
        return [self.block.module.attn1.register_forward_hook(self._after_self_attention)]

    def keep(self, x: Tensor | None) -> None:
        self._x = x

    def _after_self_attention(self, attention: Any, args: tuple[Any, ...], n: Tensor) -> Tensor | None:
        call, x = self.block.call, self._x
        self._x = None
        self.block.seen.add("attn1")
        if call is None or x is None:
            return None
        setting = call.setting
        if setting.is_off:
            return None
        y = x + n
        for group in setting.groups:
            if group.kept is None:
                residual = self._residual(y, group, setting).to(n.dtype)
                call.report(self.block.index, residual, y)
                return n + residual
            rows = y[group.kept]
            residual = self._residual(rows, group, setting).to(n.dtype)
            call.report(self.block.index, residual, rows)
            n = n.index_add(0, group.kept, residual)
        return n

    def _residual(self, y: Tensor, group: Group, setting: Setting) -> Tensor:
        dtype = self.block.dtype(y, self._gate.to_out.weight)
        keys, values = self._gate.project(group.tokens.to(dtype))
        identity = GateIdentity(keys, values, group.bias, setting.strength)
        return self._gate.residual(y.to(dtype), [identity])
