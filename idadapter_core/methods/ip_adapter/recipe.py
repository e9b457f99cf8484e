"""Training recipe of an IP-Adapter FaceID: captions, the target as its own reference, tokens and LoRA trained together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...placeholders import CAPTION
from ..method import AdapterContext, BatchFeatures, Encoded, Recipe
from .config import FaceIDConfig
from .encoder import FaceIDEncoder, FaceIDLayers


def sizes(context: AdapterContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add no settings to those that every method takes from the base."""
    return {}, {}


@torch.no_grad()
def start(layers: FaceIDLayers, key_values: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Copy the UNet's own K weights, as published. V stays at 0, so the outputs are unchanged at the start."""
    for number, pair in layers.pairs().items():
        pair.to_k_ip.weight.copy_(key_values[number][0])


def encode(encoder: FaceIDEncoder, config: FaceIDConfig, features: BatchFeatures) -> Encoded:
    """Encode the tokens; rows without the identity get those of no face (zeros)."""
    keep = features.identity.to(features.embedding)
    return Encoded(encoder(features.embedding[:, -1] * keep[:, None]), None, {})


RECIPE = Recipe(
    prompt=CAPTION,
    known_by_target=True,
    sizes=sizes,
    encode=encode,
    defaults={
        "data": {"flip": False},
        "loss": {"identity": 0.0},
        "train": {"learning_rate": 1e-4, "weight_decay": 0.01},
    },
    start=start,
)
