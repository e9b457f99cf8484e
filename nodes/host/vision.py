"""Encoding of photos with the user's CLIP vision model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from torch import Tensor

from ...idadapter_core.faces.images import Image
from ...idadapter_core.faces.views import View
from ...idadapter_core.stable_diffusion.pretrained import weights_digest
from ...idadapter_core.types import Face, ViewKey
from .images import to_image


def encode_heads(clip_vision: Any, heads: Iterable[Image]) -> tuple[Tensor, Tensor]:
    """Encode pictures (S, S, 3), RGB uint8, to CLIP vision's hidden states.

    Returns:
        patch tokens (F, P, d) of the last layer but one, without the class token, as used by IP-Adapter's image encoders;
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


def digest_of(clip_vision: Any) -> str:
    """Return the id of a CLIP vision model in features, a digest of its weights. Computed once per loaded model."""
    model = clip_vision.model
    if model not in _digests:
        _digests[model] = weights_digest(model.state_dict())
    return _digests[model]


def encode_views(
    clip_vision: Any, views: Sequence[View], photos: Sequence[tuple[Image, Face]]
) -> dict[ViewKey, Tensor]:
    """Encode faces, given as (photo, face) pairs, in other views than the head: states (F or 1, L, d), class token first."""
    found: dict[ViewKey, Tensor] = {}
    for view in views:
        if view.cut is None:
            states = [_states_of_nothing(clip_vision)]
        else:
            states = []
            for photo, face in photos:
                comfy.model_management.throw_exception_if_processing_interrupted()
                picture = to_image([view.cut(photo, face)], 1)
                states.append(clip_vision.encode_image(picture)["penultimate_hidden_states"])
        found[ViewKey(digest_of(clip_vision), view.name)] = torch.cat(states).float().cpu()
    return found


def _states_of_nothing(clip_vision: Any) -> Tensor:
    """Encode pixel values of exactly 0 (CLIP's mean colour), the input that adapters were trained with for a missing face."""
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    side = clip_vision.image_size
    pixels = torch.zeros(1, 3, side, side, device=clip_vision.load_device)
    states: Tensor = clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1]
    return states


_digests: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
