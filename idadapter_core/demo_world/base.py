"""The base model: a small latent diffusion model with Stable Diffusion 1's structure, trained on the demo world's pictures.

It consists of diffusers' UNet and transformers' CLIP text encoder, whose weight names the file keeps. It predicts v with Stable Diffusion's
noise schedule. Needs the packages of the `train` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extra import require
from ..stable_diffusion.noise import NoiseSchedule, scaled_linear
from ..stable_diffusion.sampler import simple_schedule
from .autoencoder import Shape
from .shipped import load_network, save_network
from .words import LENGTH, VOCABULARY, words

LATENT_CHANNELS = Shape().latent_channels
LATENT_SIDE = 16
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 3, 4
UNET_WIDTHS = (64, 128)
UNET_HEADS = 4
KIND = "base model"
TABLE = "embeddings.token_embedding.weight"  # the text encoder's embedding table
_MODEL = "text_model."  # prefix of a text encoder's weight names in some releases of transformers


def unet_config() -> dict[str, Any]:
    """Configuration of the UNet, for diffusers."""
    return {
        "sample_size": LATENT_SIDE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": UNET_WIDTHS,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": UNET_HEADS,  # diffusers' name for the number of heads
    }


def text_config(vocabulary: int) -> dict[str, Any]:
    """Configuration of the text encoder with `vocabulary` embedding rows, for transformers."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_HEADS,
        "projection_dim": TEXT_WIDTH,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def new_text_encoder() -> Any:
    """An untrained CLIP text encoder for rows of the small table (see `Words`)."""
    transformers = require("transformers")
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config(words().unknown + 1)))


class BaseModel(nn.Module):
    """UNet and text encoder. The token ids of the text encoder are rows of a small embedding table (see `Words`)."""

    def __init__(self) -> None:
        super().__init__()
        diffusers = require("diffusers")
        self.schedule: NoiseSchedule = scaled_linear("v_prediction")
        self.unet = diffusers.UNet2DConditionModel(**unet_config())
        self.text = new_text_encoder()

    def states(self, rows: Tensor) -> Tensor:
        """Encode rows (B, 77) to text states (B, 77, D)."""
        states: Tensor = self.text(input_ids=rows).last_hidden_state
        return states

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """Predict v (B, C, 16, 16) of noisy latents (B, C, 16, 16) at timesteps (B,), with text states (B, 77, D)."""
        prediction: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=states).sample
        return prediction

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], *, seed: int, steps: int = 20, guidance: float = 3.0) -> Tensor:
        """Sample latents (B, C, 16, 16) for B prompts by Euler's method. A sample depends only on its prompt, its index and the seed."""
        rows = torch.tensor([words().rows(text) for text in (*prompts, "")])
        states = self.states(rows)
        wanted, nothing = states[:-1], states[-1:].expand(len(prompts), -1, -1)
        timesteps, sigmas = simple_schedule(self.schedule, steps)
        noise = torch.randn(
            (len(prompts), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE),
            generator=torch.Generator().manual_seed(seed),
        )
        latents = noise * float(sigmas[0].square() + 1) ** 0.5
        for step, timestep in enumerate(timesteps):
            sigma = float(sigmas[step])
            total = (sigma**2 + 1) ** 0.5
            both = torch.cat([latents, latents]) / total
            v = self(both, timestep.expand(len(both)), torch.cat([wanted, nothing]))
            with_text, without = (both / total - v * sigma / total).chunk(2)
            clean = without + guidance * (with_text - without)
            latents = latents + (latents - clean) / sigma * (float(sigmas[step + 1]) - sigma)
        return latents


def whole_table(small: Tensor) -> Tensor:
    """Expand the embeddings (K + 1, D) of known tokens and of the unknown one to CLIP's vocabulary (49408, D)."""
    table = small[words().unknown].repeat(VOCABULARY, 1)
    table[list(words().known)] = small[: words().unknown]
    return table


def save_base(base: BaseModel, path: Path) -> None:
    """Write the base model in half precision."""
    save_network(base, KIND, path, _MODEL)


def load_base(path: Path) -> BaseModel:
    """Load the base model, in float32 and eval mode.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    return load_network(BaseModel(), KIND, path, _MODEL)
