"""Adapters inside a *diffusers* `UNet2DConditionModel`, for training and for comparison with ComfyUI.

    injected = inject(unet, adapter)
    with injected.identity(tokens):
        prediction = unet(latents, timestep, encoder_hidden_states=text).sample
    injected.eject()

Only hooks are used: no module is replaced, no forward function copied, no weight of the UNet changed. This package does not import
diffusers; it relies on module names. Each call reads the current weights of the adapter's layers, so optimiser steps take effect
at once, and gradients flow to the weights and the tokens.
"""

from __future__ import annotations

from typing import Any

from ...adapter import Adapter
from ...errors import MismatchError
from ...mechanisms import Mechanisms
from .blocks import fitting_blocks, transformer_blocks
from .decoupled import DecoupledPart
from .deltas import DeltaPart
from .gated import GatedPart
from .injection import BlockHooks, Injected, Observer, Part, injected_into


def inject(unet: Any, adapter: Adapter) -> Injected:
    """Inject an adapter into a UNet until it is ejected.

    The layers are used in place: the caller moves them to the UNet's device and selects the parameters to train. Without autocast,
    gated layers and deltas must be in the UNet's dtype or a wider one, which is then their compute dtype.

    Args:
        unet: a diffusers UNet2DConditionModel (SD1.5, SD2.1, SDXL, or any size of that family); not a wrapper around one.
        adapter: an adapter with layers in the UNet.

    Returns:
        Object that sets the identity, and a context manager that ejects the adapter at the end.

    Raises:
        MismatchError: the adapter is for another UNet or has no layers for one, the UNet has other transformer blocks or fused
            projections, or an adapter is injected already. The UNet is then unchanged.
    """
    # Not `adapter.mechanisms`, which omits deltas that training has not changed yet.
    mechanisms = adapter.kind.mechanisms(adapter.config, adapter.layers)
    if not mechanisms.acts_in_unet:
        raise MismatchError(
            f"{adapter.name} has no adapter branch, so there is nothing to inject: its identity acts through text tokens alone. "
            "Choose the file of the adapter branch, or use the UNet as it is."
        )
    if injected_into(unet) is not None:
        raise MismatchError(
            f"an ID adapter is injected into this {type(unet).__name__} already, and two would train against each other. Eject it "
            "first (idadapter_core.eject)."
        )
    return Injected(unet, adapter, mechanisms, _parts)


def _parts(block: BlockHooks, mechanisms: Mechanisms) -> list[Part]:
    parts: list[Part] = []
    if mechanisms.gated is not None:
        parts.append(GatedPart(block, mechanisms.gated))
    deltas = {place.layer: delta for place, delta in mechanisms.deltas.items() if place.site == block.index}
    if deltas:
        parts.append(DeltaPart(block, deltas))
    # After the deltas, so that it hooks the query of the changed layer.
    if mechanisms.decoupled is not None:
        parts.append(DecoupledPart(block, mechanisms.decoupled))
    return parts


def eject(unet: Any) -> None:
    """Remove the adapter injected into a UNet, if there is one."""
    injected = injected_into(unet)
    if injected is not None:
        injected.eject()


__all__ = [
    "Injected",
    "Observer",
    "eject",
    "fitting_blocks",
    "inject",
    "transformer_blocks",
]
