"""Applying identities and rescaling to clones of a MODEL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...idadapter_core import Identity
from .deltas import delta_strength, patch_weights
from .gated import load_with
from .memory import LoadedAdapter
from .plan import KEY, Application, Rescale, model_name, plan_of, site_widths
from .wrappers import apply_model, calc_cond_batch, outer_sample


def apply(
    model: Any,
    loaded: LoadedAdapter,
    identity: Identity,
    weight: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    mask: Any = None,
    node_id: str | None = None,
) -> tuple[Any, Application]:
    """Apply an identity to a clone of the MODEL. Return the clone and the application.

    Args:
        weight: strength of all mechanisms; 0 leaves the model exactly as it is.
        start_percent: start of the sampling window in which it acts; `end_percent` is its end.
        mask: (B, H, W) in 0..1, the region of the image in which it acts; None: everywhere.
        node_id: the node that shows messages about it.

    Raises:
        MismatchError: the identity belongs to another adapter, or the adapter does not fit the model.
    """
    adapter = loaded.adapter
    plan = plan_of(model)
    adapter.require_identity(identity, "the identity")
    adapter.require_sites(plan.sites, site_widths(model, plan.sites), model_name(model))
    application = Application(adapter, identity, weight, start_percent, end_percent, mask, node_id)
    applications = (*plan.applications, application)
    patched = with_plan(model, applications=applications)
    load_with(patched, loaded)
    before, after = (delta_strength(some, adapter) for some in (plan.applications, applications))
    patch_weights(patched, plan, adapter, before, after)
    return patched, application


def rescaled(model: Any, rescale: Rescale) -> Any:
    """Return a clone of the MODEL with this rescaling, replacing any other."""
    return with_plan(model, rescale=rescale)


def with_plan(model: Any, **changes: Any) -> Any:
    """Return a clone of the MODEL with these fields of its plan changed."""
    clone = model.clone()
    plan = replace(plan_of(model), **changes)
    clone.model_options.setdefault("transformer_options", {})[KEY] = plan
    install(clone)
    return clone


def install(model: Any) -> None:
    """Register the wrappers on a MODEL that carries a plan, once."""
    wrappers = {
        WrappersMP.OUTER_SAMPLE: outer_sample,
        WrappersMP.CALC_COND_BATCH: calc_cond_batch,
        WrappersMP.APPLY_MODEL: apply_model,
    }
    for kind, wrapper in wrappers.items():
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)
