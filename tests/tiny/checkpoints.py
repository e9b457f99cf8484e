"""Tiny Stable Diffusion models with random weights: real classes, real key names, real loaders, a few megabytes.

Weights are drawn by `tests/golden/recipe.py` from the seed and the name of each tensor, so every call gives the same
model, and a checkpoint file holds the weights of the in-process model of the same kind and seed (rounded to fp16).

| kind                    | "sdxl"                | "sd15"         | "sd21"                  |
|-------------------------|-----------------------|----------------|-------------------------|
| UNet channels           | 32, 64, 64            | 32, 64         | 32, 64                  |
| residual blocks a level | 1                     | 1              | 1                       |
| transformer depth in    | 0, 1, 2               | 1, 1           | 1, 1                    |
| transformer depth mid   | 2                     | 1              | 1                       |
| transformer depth out   | 2, 2, 1, 1, 0, 0      | 1, 1, 1, 1     | 1, 1, 1, 1              |
| cross-attention sites   | 11                    | 7              | 7                       |
| sites, input            | 3:1, 5:2              | 1:1, 3:1       | 1:1, 3:1                |
| sites, middle           | 0:2                   | 0:1            | 0:1                     |
| sites, output           | 0:2, 1:2, 2:1, 3:1    | 0, 1, 2, 3: 1  | 0, 1, 2, 3: 1           |
| attention width         | 64                    | 32 and 64      | 32 and 64               |
| heads                   | of 16 channels        | always 4       | of 16 channels          |
| context width           | 128 = L 64 + G 64     | 64 (L)         | 64 (H)                  |
| vector conditioning     | 64 + 6 * 256 = 1600   | none           | none                    |
| prediction              | epsilon               | epsilon        | v, fp32 attention       |
| proj_in, proj_out       | linear                | 1x1 convolution| linear                  |

(Sites are written block:transformer depth, in ComfyUI's numbering.) The text encoders have 3 layers, 4 heads and the
real tokenizer with its 49408 words. The VAE is ComfyUI's TAESD: 4 latent channels, 8 pixels to a latent.

Importing this module is free; its functions need ComfyUI importable (see `tests/harness/comfy.py`). As a command it
writes the checkpoint files: `python -m tests.tiny.checkpoints --comfyui COMFYUI --models MODELS`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.golden import recipe

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE
    from comfy.supported_models_base import BASE

log = logging.getLogger(__name__)

CHECKPOINT_NAMES = {
    "sdxl": "tiny_sdxl.safetensors",
    "sd15": "tiny_sd15.safetensors",
    "sd21": "tiny_sd21.safetensors",
}
"""File name of each kind, in the `checkpoints` folder: what `CheckpointLoaderSimple` is given."""

GOLDEN_SEED = 7
"""Seed in the metadata of `tests/golden/uniid_sdxl_like.safetensors`."""

_SMALL_LEVELS: dict[str, Any] = {
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
}

# What ComfyUI's detection finds in the keys of each file. Output depths are listed from the last block to the first,
# the order in which UNetModel takes them.
_LEVELS: dict[str, dict[str, Any]] = {
    "sd15": _SMALL_LEVELS,
    "sd21": _SMALL_LEVELS,
    "sdxl": {
        "channel_mult": [1, 2, 2],
        "num_res_blocks": [1, 1, 1],
        "transformer_depth": [0, 1, 2],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 1, 1, 2, 2],
    },
}

_ANY_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
}

# A random UNet does not denoise: latents leave the sampler with a spread of about the largest sigma, divided by the
# latent scale. This brings them into the range in which TAESD does not saturate, so that images show differences.
_VAE_SCALE = 0.0125


def tiny_unet(
    kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, disable_dynamic: bool = False
) -> ModelPatcher:
    """A MODEL of the given kind ("sdxl", "sd15" or "sd21"), its weights stored in `dtype`.

    `disable_dynamic` is there because ComfyUI rebuilds a MODEL by calling this function once more with it.
    """
    patcher = unet_of_levels(kind, _LEVELS[kind], seed, dtype, disable_dynamic)
    patcher.cached_patcher_init = (tiny_unet, (kind, seed, dtype))
    return patcher


def unet_of_levels(
    kind: str,
    levels: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL of the given family with other blocks: `levels` holds what `_LEVELS` holds for each kind."""
    from tests.tiny.tiny_pack import models

    family = {"sdxl": models.TinySDXL, "sd15": models.TinySD15, "sd21": models.TinySD21}[kind]
    config = {**_ANY_UNET, **family.unet_config, **levels}
    config["num_classes"] = None if config["adm_in_channels"] is None else "sequential"
    return _patcher(family(config), seed, dtype, disable_dynamic)


def tiny_clip(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> CLIP:
    """A CLIP of the given kind: the real tokenizer over text encoders of width 64 (SDXL: two of them)."""
    import comfy.sd
    import folder_paths

    from tests.tiny.tiny_pack import models

    family = {"sdxl": models.TinySDXL, "sd15": models.TinySD15, "sd21": models.TinySD21}[kind]
    clip = comfy.sd.CLIP(
        family(family.unet_config).clip_target(),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": dtype},
    )
    for name, encoder in clip.cond_stage_model.named_children():
        recipe.fill(encoder.transformer, seed, f"{name}.")
    return clip


def tiny_vae(seed: int = 0) -> VAE:
    """A VAE for 4-channel latents, 8 pixels to a latent, whose decoder answers to latents of random UNets."""
    import comfy.sd
    import comfy.taesd.taesd

    network = comfy.taesd.taesd.TAESD(latent_channels=4)
    recipe.fill(network.taesd_encoder, seed, "taesd_encoder.")
    recipe.fill(network.taesd_decoder, seed, "taesd_decoder.")
    with torch.no_grad():
        network.vae_scale.fill_(_VAE_SCALE)
        # Low contrast around mid grey: the decoder's output is clamped to 0..1.
        network.taesd_decoder[-1].weight.mul_(0.5)
        network.taesd_decoder[-1].bias.fill_(0.5)
    return comfy.sd.VAE(sd=network.state_dict())


def golden_unet(dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """The small SDXL-shaped UNet behind `tests/golden/uniid_sdxl_like.safetensors`, as a MODEL.

    Its context is 320 = 128 + 192 wide and its vector conditioning 384, so that `apply_model` takes `y` (B, 384) as it
    is, and no sampler node can drive it: SDXL's own size conditioning alone would need 1536.
    """
    from tests.tiny.tiny_pack import models

    config = {
        **_ANY_UNET,
        **models.TinySDXL.unet_config,
        "channel_mult": [1, 2, 2],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "context_dim": 320,
        "adm_in_channels": 384,
        "num_classes": "sequential",
    }
    return _patcher(models.TinySDXL(config), GOLDEN_SEED, dtype)


def eps_prediction(
    patcher: ModelPatcher,
    latent: torch.Tensor,
    timestep: int,
    context: torch.Tensor,
    **conditioning: Any,
) -> torch.Tensor:
    """What the UNet of `patcher` predicts at a training timestep (0..999), asked for as a sampler does.

    The call goes through `BaseModel.apply_model` and so through every wrapper and patch of the MODEL. `latent`
    (B, 4, H, W) is the network's own, already scaled, input; `context` is (B, L, D); `conditioning` (`y` and so on) is
    passed on. The MODEL must predict epsilon.
    """
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    sampling = patcher.get_model_object("model_sampling")
    sigma = sampling.sigma(torch.tensor([float(timestep)])).expand(latent.shape[0])
    noise_level = sigma.view(-1, 1, 1, 1)
    noisy = latent * (noise_level**2 + sampling.sigma_data**2).sqrt()
    options = copy.copy(patcher.model_options["transformer_options"])
    denoised = model.apply_model(
        noisy, sigma, c_crossattn=context, transformer_options=options, **conditioning
    )
    return (noisy - denoised) / noise_level


def write_tiny_checkpoints(models_dir: Path) -> dict[str, Path]:
    """Write the three checkpoints below `models_dir`/checkpoints; the paths by kind."""
    import comfy.sd

    folder = models_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / name for kind, name in CHECKPOINT_NAMES.items()}
    for kind, path in paths.items():
        comfy.sd.save_checkpoint(
            str(path),
            tiny_unet(kind, dtype=torch.float16),
            tiny_clip(kind, dtype=torch.float16),
            tiny_vae(),
        )
        log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return paths


def _patcher(config: BASE, seed: int, dtype: torch.dtype, disable_dynamic: bool = False) -> ModelPatcher:
    import comfy.model_management as memory
    import comfy.model_patcher as patchers

    device, offload_device = memory.get_torch_device(), memory.unet_offload_device()
    cast = memory.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    # ComfyUI before 0.25 takes no device here.
    takes_device = "device" in inspect.signature(config.set_inference_dtype).parameters
    config.set_inference_dtype(dtype, cast, **({"device": device} if takes_device else {}))
    model = config.get_model({}, "", device=offload_device)
    recipe.fill(model.diffusion_model, seed, "unet.")
    patcher_class = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    return patcher_class(model, load_device=device, offload_device=offload_device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the tiny test checkpoints.")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI (with main.py)")
    parser.add_argument("--models", type=Path, required=True, help="ComfyUI models folder to write into")
    options = parser.parse_args(arguments)

    from tests.harness.comfy import import_comfy

    import_comfy(options.comfyui)
    write_tiny_checkpoints(options.models)


if __name__ == "__main__":
    main()
