"""The frozen CLIP vision model for IDAdapter's patch tokens, run in the same way as in ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, InputError
from ..faces.images import Image
from ..files import read_tensors
from .pretrained import (
    build_clip,
    freeze,
    from_library,
    load_folder,
    published_names,
    read_json,
    weights_digest,
)

# Sizes of the published models that the weights do not show: heads and activation by width (ViT-L/14, ViT-H/14, ViT-bigG/14).
_PUBLISHED = {1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_TOWER = "vision_model"


class VisionEncoder(nn.Module):
    """CLIP vision model. `IDAdapterConfig.vision_width` and `vision_patches` describe its features."""

    def __init__(self, model: Any):
        """
        Args:
            model: transformers' CLIPVisionModel.
        """
        super().__init__()
        self.model = model
        self.width: int = model.config.hidden_size
        self.side: int = model.config.image_size
        self.patches = (self.side // model.config.patch_size) ** 2
        self.digest = weights_digest(published_names(model, _TOWER))
        # Does not reference the network, so that it can be passed to data loader workers.
        self.preprocess = partial(preprocess, side=self.side)
        self.eval()

    @torch.no_grad()
    def states(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed pictures (F, 3, side, side) to hidden states (F, P + 1, d) of the last layer but one, class token first."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        found: Tensor = output.hidden_states[-2]
        return found

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode preprocessed pictures (F, 3, side, side) to hidden states.

        Returns:
            patch tokens (F, P, d) of the last layer but one, without the class token;
            class embedding (F, d): the class token of the last layer, before CLIP's final norm and projection. In the dtype of
            the network, or of autocast.
        """
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        return output.hidden_states[-2][:, 1:], output.last_hidden_state[:, 0]


def preprocess(heads: Sequence[Image], side: int) -> Tensor:
    """Preprocess square pictures (S, S, 3), RGB uint8, of any sizes, for the network: (F, 3, side, side), fp32 on the CPU.

    Raises:
        InputError: a picture is not square.
    """
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    pixels = []
    for head in heads:
        if head.shape[0] != head.shape[1]:
            raise InputError(f"expected a square picture of a head, got {head.shape[1]}x{head.shape[0]}")
        # Same memory layout as ComfyUI's images, because the resizing kernel depends on it.
        picture = (torch.from_numpy(head)[None].float() / 255).movedim(-1, 1)
        if picture.shape[2] != side:
            picture = F.interpolate(picture, size=(side, side), mode="bicubic", antialias=True)
        pixels.append(((255 * picture).clamp(0, 255).round() / 255 - mean) / deviation)
    return torch.cat(pixels)


def load_vision(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Load a frozen CLIP vision model from disk.

    Args:
        path: a transformers folder, or one file of weights under their published names. Sizes other than ViT-L/14, ViT-H/14 and
            ViT-bigG/14 need a config.json next to the file.
        device, dtype: device and dtype of the network.

    Raises:
        ConfigError: no such file, or unknown sizes.
        CheckpointError: it cannot be read, or is not a CLIP vision model.
    """
    path = Path(path).expanduser()
    kind = from_library("transformers", "CLIPVisionModel")
    if path.is_dir():
        model = load_folder(kind, path)
    elif path.is_file():
        model = build_clip(kind, *_from_file(path), path.name)
    else:
        raise ConfigError(
            f"{path}: no such file or folder. Name CLIP vision on this machine: a folder of transformers or a .safetensors file, "
            "for example ComfyUI's models/clip_vision."
        )
    return VisionEncoder(freeze(model, device, dtype))


def _from_file(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the configuration and the weights, without other parts of a CLIP file (the text tower, the projection)."""
    state = {
        name: value
        for name, value in read_tensors(path, mapped=True)[0].items()
        if name.startswith(f"{_TOWER}.") and not name.endswith("position_ids")
    }
    if f"{_TOWER}.embeddings.class_embedding" not in state:
        raise CheckpointError(
            f"{path.name}: holds no CLIP vision model ({_TOWER}.embeddings.class_embedding is missing). Name one with the weight "
            "names of transformers, as ComfyUI's CLIP vision files have them."
        )
    beside = path.with_name("config.json")
    if beside.is_file():
        content = read_json(beside)
        sizes = content.get("vision_config", content)
    else:
        sizes = published_sizes(path, state)
    return from_library("transformers", "CLIPVisionConfig").from_dict(dict(sizes)), state


def published_sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derive transformers' configuration of a published CLIP vision model from the shapes of its weights.

    Raises:
        ConfigError: the width is not one of the published widths.
    """
    patch = state[f"{_TOWER}.embeddings.patch_embedding.weight"]
    positions = state[f"{_TOWER}.embeddings.position_embedding.weight"]
    width = patch.shape[0]
    if width not in _PUBLISHED:
        raise ConfigError(
            f"{path.name}: a CLIP vision model of width {width} is none of {', '.join(map(str, _PUBLISHED))}, so its heads are not "
            "known. Put its config.json beside it, or name a folder of transformers."
        )
    heads, activation = _PUBLISHED[width]
    layers = f"{_TOWER}.encoder.layers."
    return {
        "hidden_size": width,
        "intermediate_size": state[f"{layers}0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(
            {name.removeprefix(layers).split(".")[0] for name in state if name.startswith(layers)}
        ),
        "num_attention_heads": heads,
        "hidden_act": activation,
        "patch_size": patch.shape[2],
        "image_size": math.isqrt(len(positions) - 1) * patch.shape[2],
    }
