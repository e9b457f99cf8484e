"""Photos through the user's CLIP vision model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...idadapter_core.faces.images import Image
from .images import to_image


def encode_heads(clip_vision: Any, heads: Iterable[Image]) -> tuple[Tensor, Tensor]:
    """CLIP vision's hidden states of pictures (S, S, 3), RGB uint8.

    Returns:
        patch tokens (F, P, d) of the last layer but one, without the class token, as IP-Adapter's image encoders read them;
        class embedding (F, d): the class token of the last layer, before CLIP's final norm and projection (transformers:
        `last_hidden_state[:, 0]`). Both fp32 on the CPU.
    """
    patches, classes = [], []
    for head in heads:
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = clip_vision.encode_image(to_image([head], 1))
        patches.append(encoded["penultimate_hidden_states"][:, 1:])
        classes.append(encoded["last_hidden_state"][:, 0])
    return torch.cat(patches).float().cpu(), torch.cat(classes).float().cpu()
