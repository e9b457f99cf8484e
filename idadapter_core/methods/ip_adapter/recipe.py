"""How an IP-Adapter FaceID is trained: captions, the target being its own reference, tokens and LoRA together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...prompts import CAPTION
from ..method import Around, Encoded, Recipe, Seen
from .config import FaceIDConfig
from .encoder import FaceIDEncoder, FaceIDLayers


def sizes(around: Around) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nothing beyond what every method takes from the base."""
    return {}, {}


@torch.no_grad()
def start(layers: FaceIDLayers, key_values: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Keys start as the UNet's own, as published; values at 0, so that the start changes nothing."""
    for number, pair in layers.pairs().items():
        pair.to_k_ip.weight.copy_(key_values[number][0])


def encode(encoder: FaceIDEncoder, config: FaceIDConfig, seen: Seen) -> Encoded:
    """The tokens of nobody where the identity is dropped."""
    keep = seen.identity.to(seen.embedding)
    return Encoded(encoder(seen.embedding[:, -1] * keep[:, None]), None, {})


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
