"""IDAdapter in ComfyUI's UNet: gated adapters as a middle patch, K/V deltas as weight patches, weights in ComfyUI's hands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.modules import attention as comfy_attention
from torch import Tensor

from ...idadapter_core import Adapter
from ...idadapter_core.attention import rescale_factor, sample_norm
from ...idadapter_core.checkpoint import identical
from ...idadapter_core.errors import InputError, MismatchError
from ...idadapter_core.methods.idadapter import GateIdentity
from ...idadapter_core.sites import Site
from .call import Acting, Call, call_of
from .memory import LoadedAdapter
from .plan import KEY, Application, Plan, plan_of
from .run import Row, expand_rows, tokens_size


def load_with(model: Any, adapter: LoadedAdapter) -> None:
    """Have ComfyUI load an adapter's gated layers whenever it loads this MODEL (a clone of ours), if any of them can act on it."""
    digest = adapter.adapter.digest
    acts = any(a.acts and a.adapter.digest == digest for a in plan_of(model).applications)
    if adapter.gates is None or not acts:
        return
    loaded = list(model.additional_models.get(KEY, []))
    if all(patcher.model.adapter_digest != digest for patcher in loaded):
        model.set_additional_models(KEY, [*loaded, adapter.gates])


def loaded_gates(model: Any, plan: Plan) -> dict[Adapter, Any]:
    """The gated layers of each adapter of a plan, where a BaseModel that is sampled has them."""
    patcher = getattr(model, "current_patcher", None)
    patchers = [] if patcher is None else patcher.get_additional_models_with_key(KEY)
    by_digest = {loaded.model.adapter_digest: loaded.model for loaded in patchers}
    adapters = {application.adapter for application in plan.applications if application.gated}
    return {adapter: by_digest.get(adapter.digest, adapter.layers.gates) for adapter in adapters}


def delta_strength(applications: Sequence[Application], adapter: Adapter) -> float:
    """How strongly an adapter's K/V deltas act on a MODEL.

    Weights are shared by all rows of a model call, so they follow the strength alone, not masks or windows. One identity applied
    several times at the same place and time counts with the sum of its strengths. Of several people, places or times the
    strongest decides, because each of them wants the deltas once. Of two that are as strong with opposite signs it is the
    positive, whatever their order.
    """
    groups: list[list[Application]] = []
    for application in applications:
        if application.adapter.digest != adapter.digest or not application.switched_on:
            continue
        group = next((g for g in groups if _same_but_strength(g[0], application)), None)
        if group is None:
            groups.append([application])
        else:
            group.append(application)
    strengths = [sum(application.weight for application in group) for group in groups]
    return max(strengths, key=lambda strength: (abs(strength), strength), default=0.0)


def _same_but_strength(one: Application, other: Application) -> bool:
    """Whether two applications of one adapter put the same person at the same place and time."""
    windows = [(a.start_percent, a.end_percent) for a in (one, other)]
    if windows[0] != windows[1] or (one.mask is None) != (other.mask is None):
        return False
    if one.mask is not None and other.mask is not None and not torch.equal(one.mask, other.mask):
        return False
    return identical(one.identity, other.identity)


def patch_weights(model: Any, plan: Plan, adapter: Adapter, before: float, after: float) -> None:
    """Bring the K/V deltas of an adapter on a MODEL (a clone of ours) from one strength to another.

    Raises:
        MismatchError: the model has no such weights.
    """
    if not adapter.deltas or before == after:
        return
    modules = {site.index: site.comfy_module for site in plan.sites}
    patches = {
        f"diffusion_model.{modules[number]}.{name}.weight": ("diff", (delta,))
        for number, pair in adapter.deltas.items()
        for name, delta in zip(("to_k", "to_v"), pair, strict=True)
    }
    # Differences add up to what one patch of the new strength would do, whatever lies between them.
    applied = model.add_patches(patches, after - before)
    if missing := sorted(set(patches) - set(applied)):
        if any("_orig_mod" in key for key in model.model_state_dict()):
            raise MismatchError(
                f"this model was compiled by another node, which hides the weights that {adapter.name} changes. Put Apply ID Adapter "
                "before that node, or compile with ComfyUI's own TorchCompileModel, which may stand before or after."
            )
        raise MismatchError(
            f"{adapter.name} changes weights that this model has not: {', '.join(missing[:3])}. Load a model of the adapter's "
            f"family ({adapter.family})."
        )


def remember_norm(n: Tensor, extra: dict[str, Any]) -> Tensor:
    """An attn1_output_patch: what the gated residual of this block is measured against."""
    call = call_of(extra)
    if call is not None:
        call.self_norm[:] = [sample_norm(n)]
    return n


class GatePatch:
    """The middle patch of all sites: what the gated adapters add to the image tokens of each row."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = {site.comfy: site for site in sites}
        self.depths = Counter(site.comfy[:2] for site in sites)

    def _site(self, extra: Mapping[str, Any]) -> Site | None:
        """The site of a block; None where another node's copy of the block does not say."""
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
            call.run.placed = False
            return x
        groups: dict[str, list[Acting]] = {}  # by digest: one file loaded twice is one adapter
        for acting in call.gated:
            adapter = call.run.plan.applications[acting.number].adapter
            if any(adapter.gates[site.index]):
                groups.setdefault(adapter.digest, []).append(acting)
        if not groups:
            return x
        rows = expand_rows(call.rows, extra, x.shape[0])
        # Adapters stand side by side: none sees what another adds, so their order does not matter. One alone may write
        # into the stream.
        alone = len(groups) == 1 and not call.gates_normalized and not x.requires_grad
        out = x if alone and call.owns_stream else x.clone()
        for group in groups.values():
            adapter = call.run.plan.applications[group[0].number].adapter
            by_number = {acting.number: acting for acting in group}
            gate = _Gate(call, adapter, site, extra)
            for span in call.run.spans(rows, tuple(by_number)):
                part = slice(span.start, span.stop)
                people = [
                    (call.run.gate_identity(site, handle, x.device, x.dtype), by_number[number])
                    for number, handle in span.handles
                ]
                masks = [gate.mask(acting, rows[part], x) for _, acting in people]
                if call.gates_normalized:
                    for (identity, acting), mask in zip(people, masks, strict=True):
                        # A limit holds what the adapter adds at its weight; its feed-forward makes that no mere multiple.
                        weight, at_most = (1.0, None) if acting.at_most is None else (acting.at_most, 1.0)
                        residual = gate.residual(x[part], [replace(identity, strength=weight)])
                        norm = _self_norm(call, x)[part]
                        factor = rescale_factor(norm, residual, acting.strength, at_most=at_most)
                        out[part] += residual * (factor if mask is None else factor * mask)
                    continue
                identities = [
                    replace(identity, strength=acting.strength if mask is None else mask * acting.strength)
                    for (identity, acting), mask in zip(people, masks, strict=True)
                ]
                if alone:
                    gate.add(out[part], identities)
                else:
                    out[part] += gate.residual(x[part], identities)
        return out


def _self_norm(call: Call, x: Tensor) -> Tensor:
    """Norm of this block's self-attention output for each row of x.

    Raises:
        InputError: the block was not asked for it.
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
        self.module = call.gates[adapter][str(site.index)]
        self.values = adapter.gates[site.index]
        self.extra = extra

    def add(self, x: Tensor, identities: list[GateIdentity]) -> None:
        """Let identities act on image tokens in place."""
        self.module(x, identities, gates=self.values, attention=self._attention, inplace=True)

    def residual(self, x: Tensor, identities: list[GateIdentity]) -> Tensor:
        """What identities add to image tokens."""
        added: Tensor = self.module.residual(x, identities, gates=self.values, attention=self._attention)
        return added

    def mask(self, acting: Acting, rows: tuple[Row, ...], x: Tensor) -> Tensor | None:
        """The mask of an application for these rows, (1 or rows, N, 1)."""
        if not acting.masked:
            return None
        size = tokens_size(self.extra, x.shape[1], self.call.latent_size)
        return self.call.run.mask(acting.number, rows, size, x.device, x.dtype)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        # Without the options: other packs' overrides of attention expect ComfyUI's own layers.
        out: Tensor = comfy_attention.optimized_attention(
            q, k, v, heads, attn_precision=self.extra.get("attn_precision")
        )
        return out
