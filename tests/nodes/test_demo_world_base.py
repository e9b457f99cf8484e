"""The demo world's base model draws the same in ComfyUI and in its own form, where it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from idadapter_core.demo_world.autoencoder import Autoencoder, Shape, load_autoencoder, save_autoencoder
from idadapter_core.demo_world.base import LATENT_CHANNELS, BaseModel, load_base, save_base
from idadapter_core.demo_world.build.trainer_files import write_base_folder
from idadapter_core.stable_diffusion.base import load_base as load_trainers_base
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.pipeline import Pipeline
from idadapter_core.stable_diffusion.sampler import SAMPLERS
from tests.golden import recipe

SLIM = Shape(LATENT_CHANNELS, (8, 8, 16, 16), (0, 1, 1, 1), (0, 1, 1, 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained base model and autoencoder."""
    folder = tmp_path_factory.mktemp("demo_world")
    base = BaseModel()
    recipe.fill(base, 0, "demo.")
    save_base(base, folder / "base.safetensors")
    torch.manual_seed(0)
    save_autoencoder(Autoencoder(SLIM), folder / "autoencoder.safetensors")
    return folder / "base.safetensors", folder / "autoencoder.safetensors"


def test_ksampler_draws_what_the_base_model_does(files: tuple[Path, Path]) -> None:
    from ComfyUI_IDAdapter.nodes.host.demo_world import open_base

    import nodes as comfy_nodes

    model, clip, vae = open_base(*files)
    text = "a photo of a woman, smiling zebra in the snow"
    positive, negative = (comfy_nodes.CLIPTextEncode().encode(clip, words)[0] for words in (text, ""))
    empty = {"samples": torch.zeros(1, 4, 16, 16)}
    drawn = comfy_nodes.KSampler().sample(model, 3, 4, 3.0, "euler", "simple", positive, negative, empty)[0]
    ours = load_base(files[0])
    latents = ours.draw([text], seed=3, steps=4, guidance=3.0)
    theirs = model.model.latent_format.process_in(drawn["samples"])
    torch.testing.assert_close(theirs, latents, atol=2e-3 * float(latents.abs().max()), rtol=0)
    picture = comfy_nodes.VAEDecode().decode(vae, drawn)[0]
    wanted = (load_autoencoder(files[1]).decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(picture, wanted, atol=5e-3, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_trainer_draws_the_same_from_the_folder_written_for_it(
    sampler: str, files: tuple[Path, Path], tmp_path: Path, comfyui: Path
) -> None:
    from ComfyUI_IDAdapter.nodes.host.demo_world import open_base

    import nodes as comfy_nodes

    write_base_folder(load_base(files[0]), files[1], tmp_path)
    config = BaseConfig(path=str(tmp_path), family="sd15", tokenizer=str(comfyui / "comfy" / "sd1_tokenizer"))
    pipeline = Pipeline(load_trainers_base(config))
    text = "a painted portrait of a woolen zebra, smiling in the snow"
    drawn = pipeline.generate(
        text, seed=3, steps=4, cfg=3.0, width=128, height=128, negative="sad", sampler=sampler
    )
    model, clip, vae = open_base(*files)
    positive, negative = (comfy_nodes.CLIPTextEncode().encode(clip, words)[0] for words in (text, "sad"))
    empty = {"samples": torch.zeros(1, 4, 16, 16)}
    latents = comfy_nodes.KSampler().sample(model, 3, 4, 3.0, sampler, "simple", positive, negative, empty)[0]
    picture = comfy_nodes.VAEDecode().decode(vae, latents)[0][0].movedim(2, 0)
    torch.testing.assert_close(drawn, picture, atol=5e-3, rtol=0)
