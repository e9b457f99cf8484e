"""Gated layers in ComfyUI's UNet: a middle patch, with weights managed by ComfyUI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.modules import attention as comfy_attention
from torch import Tensor

from ...idadapter_core import Adapter
from ...idadapter_core.attention import repeat_copies, rescale_factor, sample_norm
from ...idadapter_core.errors import InputError
from ...idadapter_core.mechanisms.gated import GatedLayers, GateIdentity
from ...idadapter_core.sites import Site
from .call import ActiveApplication, Call, call_of
from .masks import Masks, tokens_size
from .memory import LoadedAdapter
from .plan import KEY, Plan, plan_of
from .rows import Handle, Row, Span, expand_rows, spans
from .run import Cache, Run


def load_with(model: Any, adapter: LoadedAdapter) -> None:
    """Make ComfyUI load an adapter's gated layers together with this MODEL (our own clone), if any of them can act on it."""
    digest = adapter.adapter.digest
    acts = any(a.acts and a.adapter.digest == digest for a in plan_of(model).applications)
    if adapter.gates is None or not acts:
        return
    loaded = list(model.additional_models.get(KEY, []))
    if all(patcher.model.adapter_digest != digest for patcher in loaded):
        model.set_additional_models(KEY, [*loaded, adapter.gates])


def loaded_gates(model: Any, plan: Plan) -> dict[Adapter, GatedLayers]:
    """Return the gated layers of each adapter of a plan, as loaded with the BaseModel being sampled."""
    patcher = getattr(model, "current_patcher", None)
    patchers = [] if patcher is None else patcher.get_additional_models_with_key(KEY)
    by_digest = {loaded.model.adapter_digest: loaded.model for loaded in patchers}
    found: dict[Adapter, GatedLayers] = {}
    for adapter in {application.adapter for application in plan.applications}:
        own = adapter.mechanisms.gated
        if own is not None:
            found[adapter] = by_digest.get(adapter.digest, own)
    return found


class Gated(Cache):
    """Cache of one run: keys and values of the identities at each gated adapter, and the patch."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.placed = True  # every gated layer that ran could identify its site
        # The same object in every step, so that a compiled graph stays valid.
        self.patch = GatePatch(run.plan.sites)
        self._identities: dict[tuple[torch.device, torch.dtype], dict[tuple[int, Handle], GateIdentity]] = {}
        self._spans: dict[tuple[tuple[tuple[int, Handle | None], ...], ...], tuple[Span, ...]] = {}

    def spans(self, rows: tuple[Row, ...], applications: tuple[int, ...]) -> tuple[Span, ...]:
        """Group neighbouring rows with the same identities; rows in which none of these applications acts are skipped."""
        combinations = tuple(tuple((n, row.handles[n]) for n in applications) for row in rows)
        if combinations not in self._spans:
            self._spans[combinations] = spans(combinations)
        return self._spans[combinations]

    def project(
        self, device: torch.device, dtype: torch.dtype, layers: Mapping[Adapter, GatedLayers]
    ) -> None:
        """Project K and V of every identity of the run at every gated adapter, once per device and dtype.

        Args:
            layers: the gated layers of each adapter, as loaded by ComfyUI. Only layers with an open attention gate are used.
        """
        if (device, dtype) in self._identities:
            return
        found: dict[tuple[int, Handle], GateIdentity] = {}
        for (adapter, _), handles in self.run.groups(lambda parts: parts.gated is not None).items():
            tokens = torch.cat([handle.tokens for handle in handles]).to(device, dtype)
            found |= self._project(handles, tokens, layers[adapter])
        self._identities[device, dtype] = found

    def _project(
        self, handles: list[Handle], tokens: Tensor, layers: GatedLayers
    ) -> dict[tuple[int, Handle], GateIdentity]:
        """Project tokens (H, T, D), one identity per handle, at each site; sites with a closed attention gate get empty entries."""
        found: dict[tuple[int, Handle], GateIdentity] = {}
        for site in self.run.plan.sites:
            if not handles[0].adapter.mechanisms.openings[site.index][0]:
                nothing = tokens.new_zeros(1, 0, 0)
                found |= {(site.index, handle): GateIdentity(nothing, nothing) for handle in handles}
                continue
            keys, values = layers.at(site.index).project(tokens)
            for row, handle in enumerate(handles):
                own_keys, own_values = keys[row : row + 1], values[row : row + 1]
                bias = None if handle.bias is None else handle.bias[0]
                if bias is not None and tokens.device.type != "cpu":
                    own_keys, own_values, bias = repeat_copies(own_keys, own_values, bias)
                found[site.index, handle] = GateIdentity(
                    own_keys, own_values, None if bias is None else bias.to(tokens)
                )
        return found

    def identity(self, site: Site, handle: Handle, device: torch.device, dtype: torch.dtype) -> GateIdentity:
        """Return the keys and values of one identity at a gated adapter, from `project`."""
        return self._identities[device, dtype][site.index, handle]


def remember_norm(n: Tensor, extra: dict[str, Any]) -> Tensor:
    """attn1_output_patch that stores the norm of the block's self-attention output, the base norm of its gated residual."""
    call = call_of(extra)
    if call is not None:
        call.self_norm[:] = [sample_norm(n)]
    return n


class GatePatch:
    """The middle patch of all sites: adds the residuals of the gated adapters to the image tokens of each row."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = {site.comfy: site for site in sites}
        self.depths = Counter(site.comfy[:2] for site in sites)

    def _site(self, extra: Mapping[str, Any]) -> Site | None:
        """Return the site of a block, or None if another node's copy of the block does not name it."""
        block, depth = tuple(extra.get("block") or ())[:2], extra.get("block_index")
        if depth is None and self.depths.get(block) == 1:
            depth = 0
        return self.sites.get((*block, depth))

    def __call__(self, x: Tensor, extra: dict[str, Any]) -> Tensor:
        call = call_of(extra)
        if call is None:
            return x
        site = self._site(extra)
        if site is None:
            call.run.of(Gated).placed = False
            return x
        groups: dict[str, list[ActiveApplication]] = {}  # by digest, since one file may be loaded twice
        for active in call.gated:
            adapter = call.run.plan.applications[active.number].adapter
            if any(adapter.mechanisms.openings[site.index]):
                groups.setdefault(adapter.digest, []).append(active)
        if not groups:
            return x
        rows = expand_rows(call.rows, extra, x.shape[0])
        # Adapters act in parallel: none sees the residual of another, so their order does not matter. A single one may write
        # into the stream directly.
        alone = len(groups) == 1 and not call.gates_normalized and not x.requires_grad
        out = x if alone and call.owns_stream else x.clone()
        for group in groups.values():
            adapter = call.run.plan.applications[group[0].number].adapter
            by_number = {active.number: active for active in group}
            gate = _Gate(call, adapter, site, extra)
            for span in call.run.of(Gated).spans(rows, tuple(by_number)):
                part = slice(span.start, span.stop)
                people = [
                    (call.run.of(Gated).identity(site, handle, x.device, x.dtype), by_number[number])
                    for number, handle in span.handles
                ]
                masks = [gate.mask(active, rows[part], x) for _, active in people]
                if call.gates_normalized:
                    for (identity, active), mask in zip(people, masks, strict=True):
                        # A limit applies to the residual at its full weight: the feed-forward makes it nonlinear in the weight.
                        weight, at_most = (1.0, None) if active.at_most is None else (active.at_most, 1.0)
                        residual = gate.residual(x[part], [replace(identity, strength=weight)])
                        norm = _self_norm(call, x)[part]
                        factor = rescale_factor(norm, residual, active.strength, at_most=at_most)
                        out[part] += residual * (factor if mask is None else factor * mask)
                    continue
                identities = [
                    replace(identity, strength=active.strength if mask is None else mask * active.strength)
                    for (identity, active), mask in zip(people, masks, strict=True)
                ]
                if alone:
                    gate.add(out[part], identities)
                else:
                    out[part] += gate.residual(x[part], identities)
        return out


def _self_norm(call: Call, x: Tensor) -> Tensor:
    """Norm of this block's self-attention output for each row of x.

    Raises:
        InputError: the block did not run `remember_norm`.
    """
    if not call.self_norm or len(call.self_norm[0]) != len(x):
        raise InputError(
            "another node runs this model's transformer blocks by itself, so gated layers cannot be measured against self-attention. "
            "Switch `gated` off in Normalized Identity Rescaling, or remove that node."
        )
    return call.self_norm[0]


class _Gate:
    """The gated adapter of one site in one model call."""

    def __init__(self, call: Call, adapter: Adapter, site: Site, extra: dict[str, Any]):
        self.call = call
        self.module = call.gates[adapter].at(site.index)
        self.values = adapter.mechanisms.openings[site.index]
        self.extra = extra

    def add(self, x: Tensor, identities: list[GateIdentity]) -> None:
        """Apply identities to image tokens in place."""
        self.module(x, identities, gates=self.values, attention=self._attention, inplace=True)

    def residual(self, x: Tensor, identities: list[GateIdentity]) -> Tensor:
        """Return the residual that identities add to image tokens."""
        added: Tensor = self.module.residual(x, identities, gates=self.values, attention=self._attention)
        return added

    def mask(self, active: ActiveApplication, rows: tuple[Row, ...], x: Tensor) -> Tensor | None:
        """Return the mask (1 or rows, N, 1) of an application for these rows."""
        if not active.masked:
            return None
        size = tokens_size(self.extra, x.shape[1], self.call.latent_size)
        return self.call.run.of(Masks).of(active.number, rows, size, x.device, x.dtype)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        # No transformer_options: attention overrides of other packs expect ComfyUI's own layers.
        out: Tensor = comfy_attention.optimized_attention(
            q, k, v, heads, attn_precision=self.extra.get("attn_precision")
        )
        return out
