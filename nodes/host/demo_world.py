"""Loads the demo world's base model as a ComfyUI MODEL, CLIP and VAE."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...idadapter_core.demo_world import base
from ...idadapter_core.demo_world.shipped import read_network
from ...idadapter_core.demo_world.words import VOCABULARY
from ...idadapter_core.errors import CheckpointError
from ...idadapter_core.files import read_tensors, some
from ...idadapter_core.stable_diffusion.zero_channels import without_zero_channels


class DemoWorldLatents(comfy.latent_formats.SD15):
    latent_channels = base.LATENT_CHANNELS
    latent_rgb_factors = None  # SD1.5's preview factors are for other channels
    taesd_decoder_name = None


class _TextEncoder(comfy.sd1_clip.SD1ClipModel):
    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        sizes = {"clip_l_model_config": base.text_config(VOCABULARY)}
        super().__init__(device=device, dtype=dtype, model_options={**(model_options or {}), **sizes})


class DemoWorldModel(comfy.supported_models.SD15):
    unet_config = {
        **comfy.supported_models.SD15.unet_config,
        "context_dim": base.TEXT_WIDTH,
        "model_channels": base.UNET_WIDTHS[0],
    }
    unet_extra_config = {"num_heads": base.UNET_HEADS, "num_head_channels": -1}
    latent_format = DemoWorldLatents

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # though it has more than the usual four channels

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, _TextEncoder)


class DemoWorldParts(NamedTuple):
    model: Any
    clip: Any
    vae: Any


def open_base(path: Path, autoencoder: Path) -> DemoWorldParts:
    """Load MODEL, CLIP and VAE from the demo world's two files.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind.
    """
    state = read_network(base.KIND, path)
    return DemoWorldParts(_unet(path), _text_encoder(_part(state, "text.")), _vae(autoencoder))


def open_vision(config: Path, weights: Path) -> Any:
    """Load CLIP_VISION from the files of a transformers model. ComfyUI's own loader knows published sizes only.

    Raises:
        CheckpointError: a file is damaged, or they do not match.
    """
    try:
        model = comfy.clip_vision.ClipVisionModel(str(config))
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{config} is damaged ({type(error).__name__}: {error}); get this pack again."
        ) from error
    missing, unexpected = model.load_sd(read_tensors(weights)[0])
    if missing or unexpected:
        raise CheckpointError(
            f"{weights.name} of the demo world's CLIP vision does not match its {config.name} ({some([*missing, *unexpected])}); get "
            "this pack again."
        )
    return model


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _config() -> DemoWorldModel:
    """Return the config that ComfyUI would detect from the weight names if it supported such small models."""
    levels = len(base.UNET_WIDTHS)
    channels = {"in_channels": base.LATENT_CHANNELS, "out_channels": base.LATENT_CHANNELS}
    return DemoWorldModel(
        {
            **DemoWorldModel.unet_config,
            **channels,
            "image_size": base.LATENT_SIDE,
            "use_spatial_transformer": True,
            "legacy": False,
            "num_classes": None,
            "channel_mult": [width // base.UNET_WIDTHS[0] for width in base.UNET_WIDTHS],
            "num_res_blocks": [1] * levels,
            "transformer_depth": [1] * levels,
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * (2 * levels),
        }
    )


def _unet(path: Path, disable_dynamic: bool = False) -> Any:
    """Build the MODEL. ComfyUI passes `disable_dynamic` when it rebuilds a MODEL by calling this function again."""
    config = _config()
    memory = comfy.model_management
    device, offload_device = memory.get_torch_device(), memory.unet_offload_device()
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=offload_device)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = _part(read_network(base.KIND, path), "unet.")
    model.diffusion_model.load_state_dict({names[name]: value.float() for name, value in weights.items()})
    patchers = comfy.model_patcher
    patcher = (patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher)(
        model, load_device=device, offload_device=offload_device
    )
    patcher.cached_patcher_init = (_unet, (path,))
    return patcher


def _text_encoder(weights: dict[str, Tensor]) -> Any:
    """Build the CLIP. Words missing from the small table get the row of the unknown word."""
    table = base.whole_table(weights[base.TABLE].float())
    clip = comfy.sd.CLIP(
        _config().clip_target(), embedding_directory=_embeddings(), model_options={"dtype": torch.float32}
    )
    full = {f"text_model.{name}": value.float() for name, value in {**weights, base.TABLE: table}.items()}
    clip.cond_stage_model.clip_l.transformer.load_state_dict(full, strict=False)
    return clip


@functools.cache
def _embeddings() -> list[str]:
    import folder_paths

    found: list[str] = folder_paths.get_folder_paths("embeddings")
    return found


def _vae(path: Path) -> Any:
    state, metadata = read_tensors(path)
    vae = comfy.sd.VAE(sd=state, metadata=metadata)
    network = vae.first_stage_model  # a TAESD, filled up with zeros
    network.taesd_encoder = without_zero_channels(network.taesd_encoder)
    network.taesd_decoder = without_zero_channels(network.taesd_decoder)
    return vae
