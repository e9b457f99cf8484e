"""Finds the transformer blocks of a diffusers UNet and checks that adapters support them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ...adapter import Adapter
from ...errors import MismatchError
from ...sites import Site, attention_sites

# The argument that diffusers passes from the UNet down to each transformer block.
ARGUMENT = "cross_attention_kwargs"


def transformer_blocks(unet: Any) -> dict[Site, Any]:
    """Return the block of each cross-attention site of a diffusers UNet2DConditionModel, in checkpoint order.

    Raises:
        MismatchError: another model, or blocks that do not compute x + attn1(norm(x)) and then cross-attention alone.
    """
    argument_position(unet)
    return {site: _block(unet, site.diffusers_module) for site in attention_sites(unet.state_dict())}


def fitting_blocks(unet: Any, adapter: Adapter) -> dict[Site, Any]:
    """Return the `transformer_blocks` of a UNet after checking that the adapter fits them.

    Raises:
        MismatchError: as in `transformer_blocks`, or the adapter was made for a UNet of other sizes.
    """
    blocks = transformer_blocks(unet)
    widths = {
        site.comfy_module: (block.attn2.to_k.out_features, block.attn2.to_k.in_features)
        for site, block in blocks.items()
    }
    adapter.require_sites(tuple(blocks), widths, type(unet).__name__)
    return blocks


def argument_position(module: nn.Module) -> int:
    """Return the index of `ARGUMENT` among the positional arguments of a module's forward."""
    names = list(inspect.signature(type(module).forward).parameters)
    if ARGUMENT not in names:
        raise MismatchError(
            f"{type(module).__name__} takes no {ARGUMENT}, so it is no UNet2DConditionModel of diffusers. Pass that model itself, "
            "not a pipeline, nor what accelerate, DDP or torch.compile wrap around it. In ComfyUI, use Apply ID Adapter."
        )
    return names.index(ARGUMENT) - 1  # without self


def _block(unet: Any, module: str) -> Any:
    """Return the transformer block of a cross-attention layer."""
    name = module.removesuffix(".attn2")
    block = unet.get_submodule(name)
    if problem := _problem(block):
        raise MismatchError(
            f"{name} of this {type(unet).__name__} {problem}, and the adapter cannot act there as it was made to. Use a UNet of "
            "SD1.5, SD2.1, SDXL or of that family."
        )
    # The flag fused_projections is unreliable: unfusing swaps the processors but does not reset it.
    if type(block.attn2.processor).__name__.startswith("Fused"):
        raise MismatchError(
            f"the projections of {module} are fused, and adapters work with the single ones. Call unet.unfuse_qkv_projections() "
            "before the adapter is injected."
        )
    return block


def _problem(block: Any) -> str:
    """Explain why a block does not compute x + attn1(norm(x)) and then cross-attention alone; empty if it does."""
    if all(kind.__name__ != "BasicTransformerBlock" for kind in type(block).__mro__):
        return f"is a {type(block).__name__}, not a BasicTransformerBlock"
    if block.norm_type != "layer_norm":
        return f"has norms of type {block.norm_type!r}, not 'layer_norm'"
    if block.only_cross_attention or block.double_self_attention:
        return "has not self-attention followed by cross-attention"
    if block.pos_embed is not None:
        return "has position embeddings of its own"
    if hasattr(block, "fuser"):
        return "has a GLIGEN fuser, which takes the same place"
    return ""
