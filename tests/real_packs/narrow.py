"""Narrow relatives of SD1.5 and SDXL for other packs, which write the block numbers of the real UNets down.

They have all blocks of the real ones (two transformer blocks in a row where SDXL has ten), with 32 channels at the first level.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes import sampling

_LEVELS: dict[str, dict[str, Any]] = {
    "sd15": {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 2, 2],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2],
    },
}


@functools.cache
def unet(kind: str) -> Any:
    """The narrow MODEL of that kind ("sd15" or "sdxl"). Shared by all cases: none of them may be able to change it."""
    from tests.tiny.checkpoints import unet_of_levels

    return unet_of_levels(kind, _LEVELS[kind])


@functools.cache
def site_layers(kind: str) -> tuple[tuple[tuple[str, int, int], int], ...]:
    """ComfyUI's name and the channels of each cross-attention layer, in checkpoint order."""
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    weights = unet(kind).model_state_dict()
    return tuple(
        (site.comfy, weights[f"diffusion_model.{site.comfy_module}.to_k.weight"].shape[0])
        for site in attention_sites(weights)
    )


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="narrow-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def uniid(kind: str) -> Any:
    """What Load ID Adapter gives for a UniID adapter of random weights."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    from tests.tiny.uniid import CONFIGS, uniid_state, write_published

    config = replace(CONFIGS[kind], site_widths=tuple(width for _, width in site_layers(kind)))
    return load(*write_published(_folder(), uniid_state(config)))


@functools.cache
def idadapter(kind: str) -> Any:
    """What Load ID Adapter gives for an IDAdapter of random weights, its gates open."""
    from ComfyUI_IDAdapter.idadapter_core.adapter import build_adapter, save_adapter
    from ComfyUI_IDAdapter.idadapter_core.methods.idadapter import METHOD
    from ComfyUI_IDAdapter.nodes.adapter import load

    from tests.tiny.idadapter import CONFIGS, idadapter_state

    widths = tuple(width for _, width in site_layers(kind))
    heads = (4,) * len(widths) if kind == "sd15" else tuple(width // 16 for width in widths)
    config = replace(CONFIGS[kind], site_widths=widths, site_heads=heads)
    file = _folder() / "idadapter.safetensors"
    save_adapter(build_adapter(METHOD.name, config, idadapter_state(config), "narrow"), file)
    return load(file, None)


@functools.cache
def _person(kind: str, method: str) -> Any:
    if method == "uniid":
        return replace(sampling.person(kind, text=False), adapter=uniid(kind).adapter.digest)
    from ComfyUI_IDAdapter.idadapter_core import Mix

    from tests.tiny.idadapter import vision_features

    return idadapter(kind).encode(vision_features(1, 4), Mix())


def apply(
    model: Any, kind: str, method: str = "uniid", weight: float = 1.0, mask: Tensor | None = None
) -> Any:
    """Apply ID Adapter, with an adapter of that method."""
    adapter = uniid(kind) if method == "uniid" else idadapter(kind)
    return sampling.node("IDAdapterApply", model, adapter, _person(kind, method), weight, 0.0, 1.0, mask)


def draw(
    model: Any,
    kind: str,
    *,
    positive: sampling.Conditioning | None = None,
    negative: sampling.Conditioning | None = None,
    size: int = 16,
    batch: int = 1,
    **options: Any,
) -> Tensor:
    """What KSampler gives, (batch, 4, size, size). Some packs draw from the global random numbers: each call begins them anew."""
    torch.manual_seed(0)
    return sampling.sample(
        model,
        positive or sampling.prompt(kind, "positive"),
        negative or sampling.prompt(kind, "negative"),
        latent_noise=sampling.noise(batch, size, size),
        **options,
    )


def picture(seed: int = 0, size: int = 128) -> Tensor:
    """An IMAGE (1, size, size, 3) of noise."""
    return recipe.value(seed, "picture", (1, size, size, 3)).sigmoid()


def left_mask(share: float = 0.5, size: int = 128) -> Tensor:
    """A MASK (1, size, size) that is white in this share of the columns, from the left."""
    mask = torch.zeros(1, size, size)
    mask[..., : round(share * size)] = 1
    return mask
