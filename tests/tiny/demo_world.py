"""The demo world's files with untrained networks in place of those that take hours."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from idadapter_core.adapter import build_adapter, initial_adapter, save_adapter
from idadapter_core.demo_world import shipped
from idadapter_core.demo_world.autoencoder import Autoencoder, Shape, save_autoencoder
from idadapter_core.demo_world.base import LATENT_CHANNELS, TEXT_WIDTH, BaseModel, save_base
from idadapter_core.demo_world.build.make import RECOGNIZER_WIDTHS
from idadapter_core.demo_world.build.train_vision import CONFIG, save_vision
from idadapter_core.faces.iresnet import digest, load_iresnet
from idadapter_core.training.adapters import AdapterRequirements, fresh_config
from tests.golden import recipe

ADAPTERS = {"uniid": "uniid", "idadapter": "idadapter", "ip_adapter": "faceid"}
"""Names of the files, by method."""
SLIM = Shape(LATENT_CHANNELS, (8, 8, 16, 16), (0, 1, 1, 1), (0, 1, 1, 1))


def write_demo_world(home: Path) -> Path:
    """Copy the shipped files and write the others: base model, autoencoder, CLIP vision and an adapter of each method with open gates.

    UniID's has no text branch.
    """
    import transformers

    shutil.copytree(shipped.ASSETS, home)
    base = BaseModel()
    recipe.fill(base, 0, "demo.")
    save_base(base, home / shipped.BASE)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        save_autoencoder(Autoencoder(SLIM), home / shipped.AUTOENCODER)
        vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CONFIG))
    save_vision(vision, home / shipped.CLIP_VISION)
    package = home / shipped.PACKAGE
    recognizer = digest(load_iresnet(package / shipped.RECOGNIZER_FILE, any_layers=True))
    (home / shipped.ADAPTERS).mkdir(exist_ok=True)
    for method, name in ADAPTERS.items():
        _write_adapter(method, base, recognizer, home / shipped.ADAPTERS / f"{name}.safetensors")
    return home


def _write_adapter(method: str, base: BaseModel, recognizer: str, path: Path) -> None:
    requirements = AdapterRequirements(
        method, {"l": TEXT_WIDTH}, (128, 64), recognizer, RECOGNIZER_WIDTHS, "adapter", {}
    )
    start = initial_adapter(fresh_config(base.unet, requirements), path.name)
    state = {
        name: recipe.weight(1, name, value.shape).reshape(value.shape)
        for name, value in start.state_dict().items()
    }
    save_adapter(build_adapter(method, start.config, state, path.name), path)
