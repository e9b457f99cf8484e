"""Tiny IP-Adapter FaceID files with random weights, in the published layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idadapter_core.adapter import Adapter, load_adapter
from idadapter_core.methods.ip_adapter import FaceIDConfig, FaceIDEncoder, FaceIDLayers
from tests.golden import recipe

TINY_SD15 = FaceIDConfig(
    hidden_width=1024, context_width=64, site_widths=(32, 64, 64, 64, 32, 32, 64), lora_rank=3
)
TINY_SDXL = FaceIDConfig(hidden_width=1024, context_width=128, site_widths=(64,) * 11, lora_rank=3)
CONFIGS = {"sd15": TINY_SD15, "sd21": TINY_SD15, "sdxl": TINY_SDXL}
"""By the kinds of `tests/tiny/checkpoints.py`."""


def published(config: FaceIDConfig, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The two dictionaries of a published file."""
    encoder, layers = FaceIDEncoder(config), FaceIDLayers(config)
    for module in (encoder, layers):
        recipe.fill(module, seed, f"{type(module).__name__}.")
    return {
        "image_proj": {k.removeprefix("image_proj."): t for k, t in encoder.state_dict().items()},
        "ip_adapter": dict(layers.state_dict()),
    }


def write_published(path: Path, config: FaceIDConfig, seed: int = 0) -> Path:
    """A file as it is published: a pickle of two dictionaries."""
    torch.save(published(config, seed), path)
    return path


def tiny_faceid(folder: Path, config: FaceIDConfig = TINY_SD15, seed: int = 0) -> Adapter:
    """An adapter through the real loading path."""
    return load_adapter(write_published(folder / f"faceid_{seed}.bin", config, seed))


def with_lora(unet: Any, weights: Mapping[str, Tensor]) -> Any:
    """A diffusers UNet whose weights have the LoRA of the published file's `ip_adapter` in them, as its reference adds it."""
    processors = [name.removesuffix(".processor") for name in unet.attn_processors]
    order = ("down_blocks", "up_blocks", "mid_block")
    processors.sort(key=lambda name: order.index(name.split(".")[0]))
    for number, name in enumerate(processors):
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            linear = unet.get_submodule(f"{name}.{'to_out.0' if layer == 'to_out' else layer}")
            up, down = (weights[f"{number}.{layer}_lora.{part}.weight"] for part in ("up", "down"))
            linear.weight.data += up @ down
    return unet
