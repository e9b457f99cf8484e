"""Adapters inside a *diffusers* `UNet2DConditionModel`, for training and for comparison with ComfyUI.

    injected = inject(unet, adapter)
    with injected.identity(tokens):
        prediction = unet(latents, timestep, encoder_hidden_states=text).sample
    injected.eject()

Everything is done by hooks: no module is replaced, no forward function copied, no weight of the UNet touched. This package does
not import diffusers; it goes by the names of modules. The weights of the adapter's layers are read at each call, so an
optimiser's steps show at once and gradients reach all of them, and the tokens.
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
    """Let an adapter act in a UNet until it is ejected.

    The layers stay where they are and as they are: move them to the UNet's device, and choose what is trained, on the layers
    themselves. Without autocast gated layers and deltas must be in the UNet's dtype or in a wider one, in which they then compute.

    Args:
        unet: a diffusers UNet2DConditionModel (SD1.5, SD2.1, SDXL, or any size of that family); not a wrapper around one.
        adapter: an adapter with layers in the UNet.

    Returns:
        What sets the identity. Used in a `with`, it is ejected at the end.

    Raises:
        MismatchError: the adapter is for another UNet or has nothing that acts in one, the UNet has other transformer blocks or
            fused projections, or an adapter is injected already. The UNet is then as it was.
    """
    # Not the adapter's own record, which leaves out deltas that training has not changed yet.
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
    # After the deltas, so that the query it sees is that of the changed layer.
    if mechanisms.decoupled is not None:
        parts.append(DecoupledPart(block, mechanisms.decoupled))
    return parts


def eject(unet: Any) -> None:
    """Remove the adapter that was injected into a UNet. Harmless where there is none."""
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
