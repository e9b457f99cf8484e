"""Decoupled attention in a diffusers UNet.

At each cross-attention, Attn(q, K_id, V_id) over the projected identity tokens is added to the head-merged output of the text
attention, before the output projection. q is the output of `to_q`; the sum is the input of `to_out`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention import KeysValues, add_identity, decoupled_attention, prepare_keys_values, sample_norm
from ...errors import InputError
from ...mechanisms.decoupled import SiteProjections
from .injection import BlockHooks, Group, Part, Setting


class DecoupledPart(Part):
    """Hooks that add attention to the identity to the text cross-attention of a block."""

    hooked = ("attn2.to_q", "attn2.to_out.0")

    def __init__(self, block: BlockHooks, layers: SiteProjections):
        super().__init__(block)
        self._layers = layers
        self._query: Tensor | None = None

    def register(self) -> list[Any]:
        attention = self.block.module.attn2
        return [
            attention.to_q.register_forward_hook(self._after_to_q),
            attention.to_out[0].register_forward_pre_hook(self._before_to_out),
        ]

    def keep(self, x: Tensor | None) -> None:
        self._query = None

    def _after_to_q(self, linear: Any, args: tuple[Tensor, ...], query: Tensor) -> None:
        self.block.seen.add("attn2.to_q")
        self._query = query

    def _before_to_out(self, linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        call, query = self.block.call, self._query
        self._query = None
        self.block.seen.add("attn2.to_out.0")
        if call is None or query is None:
            return None
        setting = call.setting
        if setting.is_off:
            return None
        text, *others = args
        out = text
        for group in setting.groups:
            self.block.require_device(query, group.tokens)
            if group.bias is not None:
                raise InputError(
                    "decoupled attention has no bias for its tokens: encode the identity without weights of photos."
                )
            if group.kept is None:
                return (self._both(query, text, group, setting), *others)
            both = self._both(query[group.kept], text[group.kept], group, setting)
            out = out.index_copy(0, group.kept, both)
        return (out, *others)

    def _both(self, query: Tensor, text: Tensor, group: Group, setting: Setting) -> Tensor:
        keys, values = (part.to(query.dtype) for part in self._layers.project(self.block.index, group.tokens))
        identity = prepare_keys_values(keys, values, self.block.module.attn2.heads)
        strength = _on_rows(setting, group, query)
        self._report(query, text, identity, strength, setting.rescale)
        return decoupled_attention(query, text, identity, strength, normalized=setting.rescale)

    def _report(
        self, query: Tensor, text: Tensor, identity: KeysValues, strength: Tensor, rescale: bool
    ) -> None:
        call = self.block.call
        if call is None or not call.is_observed(self.block.index):
            return
        with torch.no_grad():
            # Recomputed on its own: subtracting the text from the sum would lose a small addition to rounding.
            norm = sample_norm(text) if rescale else None
            nothing = torch.zeros_like(text)
            alone = add_identity(nothing, query, identity, strength, base_norm=norm)
            call.report(self.block.index, alone, text)


def _on_rows(setting: Setting, group: Group, query: Tensor) -> Tensor:
    """Return the strength as (1 or rows,), on the query's device."""
    strength = setting.strength
    if not isinstance(strength, Tensor):
        return torch.full((1,), float(strength), device=query.device)
    return strength[group.kept] if group.kept is not None and len(strength) > 1 else strength
