"""Tiny IP-Adapter FaceID files with random weights, in the published layout."""

from __future__ import annotations

from pathlib import Path

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
