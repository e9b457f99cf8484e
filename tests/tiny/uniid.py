"""Tiny UniID adapters with random weights: every part of the published ones, in the published layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from idadapter_core.adapter import Adapter, build_adapter, load_adapter, save_adapter
from idadapter_core.methods.uniid import METHOD, UniIDConfig, UniIDEncoder
from idadapter_core.methods.uniid.encoder import layers
from tests.golden import recipe

GOLDEN = UniIDConfig(text_widths=(128, 192), adapter_width=128, context_width=320, site_widths=(64,) * 17)
TINY_SDXL = UniIDConfig(
    text_widths=(64, 64),
    text_depth=2,
    text_hidden=128,
    adapter_width=64,
    adapter_depth=2,
    context_width=128,
    site_widths=(64,) * 11,
)
TINY_SD15 = UniIDConfig(
    text_widths=(64,),
    text_depth=2,
    text_hidden=128,
    adapter_width=64,
    adapter_depth=2,
    context_width=64,
    site_widths=(32, 64, 64, 64, 32, 32, 64),
)
# UniID names the text encoders l and g only, so an adapter for SD2.1 has no text branch.
CONFIGS = {"sd15": TINY_SD15, "sd21": replace(TINY_SD15, text_widths=()), "sdxl": TINY_SDXL}
"""By the kinds of `tests/tiny/checkpoints.py`."""


def uniid_state(config: UniIDConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """All weights of a UniID adapter under the published names."""
    with torch.device("meta"):
        encoder, projections = UniIDEncoder(config), layers(config)
    shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    shapes |= {f"adapter_branch.{key}": tensor.shape for key, tensor in projections.state_dict().items()}
    return {key: recipe.weight(seed, key, shape) for key, shape in shapes.items()}


def branch(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The "text" or "adapter" branch of a state."""
    return {key: tensor for key, tensor in state.items() if key.startswith(f"{name}_branch.")}


def write_published(folder: Path, state: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """Write the two folders as UniID publishes them; returns the adapter's and the text branch's file."""
    paths = []
    for name in ("adapter", "text"):
        path = folder / f"{name}_branch" / "pytorch_model.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(branch(state, name), path)
        paths.append(path)
    return paths[0], paths[1]


def tiny_adapter(config: UniIDConfig, folder: Path, seed: int = 0) -> Adapter:
    """An adapter that went through the published layout on disk."""
    return load_adapter(*write_published(folder, uniid_state(config, seed)))


def tiny_uniid(config: UniIDConfig, seed: int = 0) -> Adapter:
    """The same adapter in memory."""
    return build_adapter(METHOD.name, config, uniid_state(config, seed), f"tiny {seed}")


def write_tiny_adapters(models_dir: Path) -> None:
    """Write adapters for the tiny checkpoints below `models_dir`/idadapter: SDXL as published and as one file, SD1.5 as one."""
    folder = models_dir / "idadapter"
    save_adapter(tiny_adapter(TINY_SDXL, folder / "uniid_tiny"), folder / "uniid_tiny_sdxl.safetensors")
    adapter = tiny_adapter(TINY_SD15, folder / "uniid_tiny_sd15")
    save_adapter(adapter, folder / "uniid_tiny_sd15.safetensors")
