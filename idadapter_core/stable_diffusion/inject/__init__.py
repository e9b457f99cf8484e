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

from ...checkpoint import Adapter
from ...errors import MismatchError
from ...methods import Config, idadapter, uniid
from . import decoupled as projected, gated
from .blocks import fitting_blocks, transformer_blocks
from .decoupled import InjectedUniID
from .gated import InjectedIDAdapter
from .injection import Injected, Observer, injected_into

_KINDS: dict[str, type[InjectedIDAdapter | InjectedUniID]] = {
    idadapter.METHOD: InjectedIDAdapter,
    uniid.METHOD: InjectedUniID,
}


def inject(unet: Any, adapter: Adapter | idadapter.IDAdapterLayers | uniid.SiteProjections) -> Injected:
    """Let an adapter act in a UNet until it is ejected.

    The layers stay where they are and as they are: move them to the UNet's device, and choose what is trained, on the layers
    themselves. Without autocast those of an IDAdapter must be in the UNet's dtype or in a wider one, in which they then compute.

    Args:
        unet: a diffusers UNet2DConditionModel (SD1.5, SD2.1, SDXL, or any size of that family); not a wrapper around one.
        adapter: an adapter with layers in the UNet, or its layers alone.

    Returns:
        What sets the identity: an `InjectedIDAdapter` or an `InjectedUniID`. Used in a `with`, it is ejected at the end.

    Raises:
        MismatchError: the adapter is for another UNet or has nothing that acts in one, the UNet has other transformer blocks or
            fused projections, or an adapter is injected already. The UNet is then as it was.
    """
    if isinstance(adapter, idadapter.IDAdapterLayers):
        adapter = _bare(idadapter.METHOD, gated.config_of(adapter), adapter)
    elif isinstance(adapter, uniid.SiteProjections):
        adapter = _bare(uniid.METHOD, projected.config_of(adapter), adapter)
    if not adapter.config.has_adapter_branch:
        raise MismatchError(
            f"{adapter.name} has no adapter branch, so there is nothing to inject: its identity acts through text tokens alone. "
            "Choose the file of the adapter branch, or use the UNet as it is."
        )
    if injected_into(unet) is not None:
        raise MismatchError(
            f"an ID adapter is injected into this {type(unet).__name__} already, and two would train against each other. Eject it "
            "first (idadapter_core.stable_diffusion.inject.eject)."
        )
    return _KINDS[adapter.method](unet, adapter)


def _bare(method: str, config: Config, layers: Any) -> Adapter:
    """An Adapter around layers alone."""
    return Adapter(name="the adapter", digest="", method=method, config=config, encoder=None, layers=layers)


def eject(unet: Any) -> None:
    """Remove the adapter that was injected into a UNet. Harmless where there is none."""
    injected = injected_into(unet)
    if injected is not None:
        injected.eject()


__all__ = [
    "Injected",
    "InjectedIDAdapter",
    "InjectedUniID",
    "Observer",
    "eject",
    "fitting_blocks",
    "inject",
    "transformer_blocks",
]
