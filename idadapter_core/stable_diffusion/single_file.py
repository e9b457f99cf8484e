"""Loads base models from single-file checkpoints, as used by ComfyUI and most sites.

A file holds weights only. The configurations of the published sizes are defined here; other sizes need a folder with diffusers
configurations (`base.config`). diffusers converts the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..files import read_tensors
from .pretrained import build_clip, build_diffusers, from_library, read_json
from .vae import Autoencoder, autoencoder_from_state

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
_CLIP: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}


def _clip(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return {
        **_CLIP,
        **sizes,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "l": _clip(768, 12, 12, "quick_gelu"),
    "h": _clip(1024, 23, 16, "gelu"),
    "g": _clip(1280, 32, 20, "gelu"),
}
_OPEN_CLIP_PREFIXES = {
    "h": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "g": ("conditioner.embedders.1.model.",),
}

# ComfyUI distinguishes SD2.1's two models by the spread of this tensor, which is above 0.09 in the v-prediction model.
_V_TELLTALE = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09


class SingleFile:
    """A loaded checkpoint file, with the configurations of its family."""

    def __init__(self, path: Path, family: str, configs: Path | None):
        """
        Args:
            path: .safetensors, or a pickle with tensors only.
            family: sd15, sd21 or sdxl.
            configs: folder with diffusers configurations (unet/config.json and so on), which override the published sizes.

        Raises:
            CheckpointError: the file cannot be read, or holds no UNet.
        """
        self.path = path
        self.family = family
        self.configs = configs
        self.state = read_tensors(path, mapped=True)[0]
        self.unet_state = self._part(UNET_PREFIX)
        if not self.unet_state:
            raise CheckpointError(
                f"{path.name}: holds no UNet ({UNET_PREFIX}…). Name a whole Stable Diffusion checkpoint in base.path, or a "
                "diffusers folder."
            )

    def unet(self) -> nn.Module:
        config = self._config("unet/config.json", _UNETS[self.family])
        convert = from_library("diffusers.loaders.single_file_utils", "convert_ldm_unet_checkpoint")
        kind = from_library("diffusers", "UNet2DConditionModel")
        weights = {f"{UNET_PREFIX}{name}": value for name, value in self.unet_state.items()}
        return build_diffusers(kind, config, weights, self.path.name, convert)

    def text_encoder(self, name: str, folder: str) -> nn.Module:
        """Build the text encoder l, h or g; `folder` is its name in diffusers folders."""
        config = from_library("transformers", "CLIPTextConfig").from_dict(
            self._config(f"{folder}/config.json", TEXT_ENCODERS[name])
        )
        utilities = "diffusers.loaders.single_file_utils"
        if name == "l":
            state = from_library(utilities, "convert_ldm_clip_checkpoint")(self.state)
        else:
            prefixes = _OPEN_CLIP_PREFIXES[name]
            prefix = next((p for p in prefixes if any(key.startswith(p) for key in self.state)), prefixes[0])
            convert = from_library(utilities, "convert_open_clip_checkpoint")
            state = convert(SimpleNamespace(config=config), self.state, prefix=prefix)
        kind = "CLIPTextModelWithProjection" if name == "g" else "CLIPTextModel"
        kept = {key: value for key, value in state.items() if _is_read(key, name, config.num_hidden_layers)}
        return build_clip(
            from_library("transformers", kind), config, kept, f"{self.path.name}, text encoder {name}"
        )

    def autoencoder(self) -> Autoencoder:
        return autoencoder_from_state(self._part(VAE_PREFIX), self.path.name, self.family, self.kl_config)

    @property
    def kl_config(self) -> dict[str, Any]:
        return self._config("vae/config.json", KL)

    def scheduler(self) -> dict[str, Any]:
        """Return diffusers' scheduler configuration: from `configs`, else detected in the file as ComfyUI does."""
        if self.configs is not None and (self.configs / "scheduler/scheduler_config.json").is_file():
            return read_json(self.configs / "scheduler/scheduler_config.json")
        if "edm_mean" in self.state or "edm_vpred.sigma_max" in self.state:
            raise ConfigError(
                f"{self.path.name}: was trained on EDM's noise levels, which are not supported. Choose another base model."
            )
        telltale = self.state.get(_V_TELLTALE) if self.family == "sd21" else None
        spread = 0.0 if telltale is None else float(telltale.float().std(correction=0))
        predicts_v = "v_pred" in self.state or spread > _V_SPREAD
        return {
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction" if predicts_v else "epsilon",
            "rescale_betas_zero_snr": predicts_v and "ztsnr" in self.state,
        }

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)
        }

    def _config(self, name: str, published: Mapping[str, Any]) -> dict[str, Any]:
        path = None if self.configs is None else self.configs / name
        return dict(published) if path is None or not path.is_file() else read_json(path)


def _is_read(key: str, encoder: str, layers: int) -> bool:
    """Return whether transformers' text model has this weight."""
    if key.endswith("position_ids") or (key == "text_projection.weight" and encoder != "g"):
        return False
    _, _, rest = key.partition("encoder.layers.")
    # diffusers' text encoder for SD2.1 omits the last layer, which is never used.
    return encoder != "h" or not rest or int(rest.partition(".")[0]) < layers
