"""Decoupled attention in ComfyUI's UNet: one attn2 replacement per site, which wraps any replacement of another pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...idadapter_core.attention import (
    PreparedIdentity,
    add_identity,
    prepare_identity,
    sample_norm,
)
from ...idadapter_core.sites import Site
from .call import Call, call_of
from .foreign import OVERRIDE, ForeignSlot, ForeignSlots, Replacement, Rescaled, text_attention
from .masks import Masks, tokens_size
from .rows import Handle, Row, Segment, expand_rows, segments
from .run import Cache, Run


class Decoupled(Cache):
    """Cache of one run: K and V of all identities at all sites, and the replacements."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._projected: dict[
            tuple[torch.device, torch.dtype], dict[tuple[int, Handle], tuple[Tensor, Tensor]]
        ] = {}
        self._prepared: dict[tuple[int, tuple[Handle, ...], torch.device, torch.dtype], PreparedIdentity] = {}
        self._segments: dict[tuple[Handle | None, ...], tuple[Segment, ...]] = {}
        self._attentions: dict[tuple[Site, int], SiteAttention] = {}

    def segments(self, rows: tuple[Row, ...], application: int) -> tuple[Segment, ...]:
        """Group the rows of one application into as few attention calls as possible, skipping rows without an identity."""
        handles = tuple(row.handles[application] for row in rows)
        if handles not in self._segments:
            self._segments[handles] = segments(handles)
        return self._segments[handles]

    def project(self, device: torch.device, dtype: torch.dtype) -> None:
        """Project K and V of every identity of the run at every site, once per device and dtype.

        Weights move to the device one site at a time, for all identities together, and do not stay there.
        """
        if (device, dtype) in self._projected:
            return
        projected: dict[tuple[int, Handle], tuple[Tensor, Tensor]] = {}
        for (adapter, _), handles in self.run.groups(lambda parts: parts.decoupled is not None).items():
            layers = adapter.mechanisms.decoupled
            assert layers is not None
            tokens = torch.cat([handle.tokens for handle in handles]).to(device)
            for site in self.run.plan.sites:
                keys, values = (part.to(dtype) for part in layers.project(site.index, tokens))
                for row, handle in enumerate(handles):
                    projected[site.index, handle] = (keys[row : row + 1], values[row : row + 1])
        self._projected[device, dtype] = projected

    def keys_values(
        self, site: Site, handles: tuple[Handle, ...], heads: int, device: torch.device, dtype: torch.dtype
    ) -> PreparedIdentity:
        """Return K and V of a segment at a site, prepared for attention."""
        key = (site.index, handles, device, dtype)
        if key not in self._prepared:
            self.project(device, dtype)
            pairs = [self._projected[device, dtype][site.index, handle] for handle in handles]
            keys, values = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            self._prepared[key] = prepare_identity(keys, values, heads)
        return self._prepared[key]

    def attention(self, site: Site, previous: Replacement | None) -> SiteAttention:
        """Return the replacement of a site, wrapping `previous`. Every step gets the same object, so compiled graphs stay valid."""
        key = (site, id(previous))
        if key not in self._attentions:
            slot = None if previous is None else self.run.of(ForeignSlots).slot(previous)
            self._attentions[key] = SiteAttention(site, slot)
        return self._attentions[key]


class SiteAttention:
    """The attn2 replacement of one site: text attention (or another pack's) plus attention to the active identities."""

    def __init__(self, site: Site, previous: ForeignSlot | None):
        self.site = site
        self.previous = previous

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        call = call_of(extra)
        base = self._base(call, q, k, v, extra)
        if call is None or not call.decoupled:
            return base.out
        out, ours = base.out, base.fresh
        norm = sample_norm(base.text) if call.normalized else None
        rows = expand_rows(call.rows, extra, q.shape[0])
        cache = call.run.of(Decoupled)
        for active in call.decoupled:
            for segment in cache.segments(rows, active.number):
                span = slice(segment.start, segment.stop)
                identity = cache.keys_values(self.site, segment.handles, extra["n_heads"], q.device, q.dtype)
                mask = None
                if active.masked:
                    size = tokens_size(extra, q.shape[1], call.latent_size)
                    mask = call.run.of(Masks).of(active.number, rows[span], size, q.device, q.dtype)
                if not ours:  # other code may still reference this tensor
                    out, ours = out.clone(memory_format=torch.contiguous_format), True
                add_identity(
                    out[span],
                    q[span],
                    identity,
                    active.scale,
                    base_norm=None if norm is None else norm[span],
                    at_most=active.at_most,
                    mask=mask,
                    inplace=True,
                )
        return out

    def _base(self, call: Call | None, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Rescaled:
        """Return the output that identities are added to."""
        if self.previous is None:
            out = text_attention(q, k, v, extra)
            return Rescaled(out, out, OVERRIDE not in extra and not out.requires_grad)
        if call is None or call.foreign_scale is None:
            out = self.previous.replacement(q, k, v, extra)
            return Rescaled(out, out, False)
        return self.previous.rescaled(q, k, v, extra, call.foreign_scale)
