"""The tiny relatives of SD1.5, SD2.1 and SDXL: ComfyUI's own model configurations with small widths."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import torch

from . import vision

TEXT_WIDTH = 64
"""Hidden width of every tiny text encoder (CLIP-L, CLIP-G and OpenCLIP-H)."""

MODEL_CHANNELS = 32
"""Width of the first UNet level; the least that GroupNorm with 32 groups allows."""

HEAD_CHANNELS = 16

SIZE_EMBEDDING = 6 * 256
"""Width of SDXL's embedded original size, crop and target size, appended to the pooled text."""

# Three layers, because SDXL and SD2 read the output of the last but one.
TEXT_ENCODER_SIZES = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 2 * TEXT_WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}


def _tiny(model_options: dict[str, Any]) -> dict[str, Any]:
    sizes = {f"{name}_model_config": dict(TEXT_ENCODER_SIZES) for name in ("clip_l", "clip_g", "clip_h")}
    return {**sizes, **model_options}


class TinySD1ClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, model_options=_tiny(model_options or {}))


class TinySD2ClipModel(comfy.text_encoders.sd2_clip.SD2ClipModel):
    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, model_options=_tiny(model_options or {}))


class TinySDXLClipModel(comfy.sdxl_clip.SDXLClipModel):
    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, model_options=_tiny(model_options or {}))


class TinySD15(comfy.supported_models.SD15):
    unet_config = {
        **comfy.supported_models.SD15.unet_config,
        "context_dim": TEXT_WIDTH,
        "model_channels": MODEL_CHANNELS,
    }
    # As in SD1.x the number of heads is fixed, so the width of a head grows with the level.
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinySD1ClipModel)


class TinySD21(comfy.supported_models.SD20):
    unet_config = {
        **comfy.supported_models.SD20.unet_config,
        "context_dim": TEXT_WIDTH,
        "model_channels": MODEL_CHANNELS,
    }
    unet_extra_config = {**comfy.supported_models.SD20.unet_extra_config, "num_head_channels": HEAD_CHANNELS}

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        # ComfyUI tells v-prediction from the spread of trained weights in a block that a tiny UNet does not have.
        return comfy.model_base.ModelType.V_PREDICTION

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.sd2_clip.SD2Tokenizer, TinySD2ClipModel
        )


class TinySDXL(comfy.supported_models.SDXL):
    unet_config = {
        **comfy.supported_models.SDXL.unet_config,
        "context_dim": 2 * TEXT_WIDTH,
        "model_channels": MODEL_CHANNELS,
        "transformer_depth": [0, 1, 2],
        "adm_in_channels": TEXT_WIDTH + SIZE_EMBEDDING,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": HEAD_CHANNELS}

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, TinySDXLClipModel)


def register() -> None:
    """Append the tiny models to the list ComfyUI searches when it opens a checkpoint, and have it recognise the tiny
    CLIP vision models. Doing it twice is harmless."""
    known = comfy.supported_models.models
    known.extend(model for model in (TinySD15, TinySD21, TinySDXL) if model not in known)
    vision.register()
