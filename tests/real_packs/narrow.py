"""Narrow relatives of SD1.5 and SDXL for other packs, which write the block numbers of the real UNets down.

They have all blocks of the real ones (of SDXL's ten transformer blocks in a row one or two), 32 channels at the first level.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.golden import recipe
from tests.tiny.uniid import TINY_SD15, TINY_SDXL, UniIDConfig, uniid_state, write_published

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
CONTEXT_WIDTH = {"sd15": 64, "sdxl": 128}


@functools.cache
def unet(kind: str) -> Any:
    """The narrow MODEL of that kind ("sd15" or "sdxl"). Shared: nothing may change it."""
    import comfy.model_management as memory
    import comfy.model_patcher as patchers
    import torch

    from tests.tiny.checkpoints import _ANY_UNET
    from tests.tiny.tiny_pack import models

    family = {"sdxl": models.TinySDXL, "sd15": models.TinySD15}[kind]
    config = {**_ANY_UNET, **family.unet_config, **_LEVELS[kind]}
    config["num_classes"] = None if config["adm_in_channels"] is None else "sequential"
    made = family(config)
    device = memory.get_torch_device()
    made.set_inference_dtype(torch.float32, None, device=device)
    model = made.get_model({}, "", device=device)
    recipe.fill(model.diffusion_model, 0, "unet.")
    return patchers.CoreModelPatcher(model, load_device=device, offload_device=device)


def site_widths(kind: str) -> tuple[int, ...]:
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    weights = unet(kind).model_state_dict("diffusion_model.")
    return tuple(
        weights[f"diffusion_model.{site.comfy_module}.to_k.weight"].shape[0] for site in attention_sites(weights)
    )


def config(kind: str) -> UniIDConfig:
    return replace({"sd15": TINY_SD15, "sdxl": TINY_SDXL}[kind], site_widths=site_widths(kind))


@functools.cache
def adapter(kind: str) -> Any:
    """What Load ID Adapter gives for an adapter of random weights that fits the narrow MODEL."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    folder = Path(tempfile.mkdtemp(prefix="narrow-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return load(*write_published(folder, uniid_state(config(kind))))
