"""Weight deltas of the UNet as ComfyUI weight patches, which combine with LoRAs in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ...idadapter_core import Adapter
from ...idadapter_core.errors import MismatchError
from ...idadapter_core.identity import identical
from ...idadapter_core.mechanisms.deltas import Delta, LowRankDelta
from .plan import Application, Plan


def delta_strength(applications: Sequence[Application], adapter: Adapter) -> float:
    """Return the strength of an adapter's deltas on a MODEL.

    All rows of a model call share the weights, so only the strength counts, not masks or windows. Strengths of one identity
    applied several times with the same mask and window are summed. Among different people, masks or windows the largest
    magnitude wins, because each of them needs the deltas once. Of two equal magnitudes with opposite signs the positive wins,
    whatever their order.
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
    """Return whether two applications of one adapter have the same identity, mask and window."""
    windows = [(a.start_percent, a.end_percent) for a in (one, other)]
    if windows[0] != windows[1] or (one.mask is None) != (other.mask is None):
        return False
    if one.mask is not None and other.mask is not None and not torch.equal(one.mask, other.mask):
        return False
    return identical(one.identity, other.identity)


def patch_weights(model: Any, plan: Plan, adapter: Adapter, before: float, after: float) -> None:
    """Change the strength of an adapter's deltas on a MODEL (our own clone) from `before` to `after`.

    Raises:
        MismatchError: the model has no such weights.
    """
    deltas = adapter.mechanisms.deltas
    if not deltas or before == after:
        return
    blocks = {site.index: site.comfy_module.removesuffix(".attn2") for site in plan.sites}
    patches = {
        f"diffusion_model.{blocks[place.site]}.{place.layer}.weight": _patch(delta)
        for place, delta in deltas.items()
    }
    # The differences sum to one patch of the new strength, whatever other patches come in between.
    applied = model.add_patches(patches, after - before)
    if missing := sorted(set(patches) - set(applied)):
        if any("_orig_mod" in key for key in model.model_state_dict()):
            raise MismatchError(
                f"this model was compiled by another node, which hides the weights that {adapter.name} changes. Put Apply ID Adapter "
                "before that node, or compile with ComfyUI's own TorchCompileModel, which may stand before or after."
            )
        raise MismatchError(
            f"{adapter.name} patches weights this model does not have: {', '.join(missing[:3])}. Load a model of the adapter's "
            f"family ({adapter.family})."
        )


def _patch(delta: Delta) -> Any:
    """Convert a delta to a ComfyUI weight patch."""
    if isinstance(delta, LowRankDelta):
        alpha = delta.scale * delta.down.shape[0]
        return LoRAAdapter(set(), (delta.up, delta.down, alpha, None, None, None))
    return ("diff", (delta.weight,))
