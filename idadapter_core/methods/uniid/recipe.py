"""Training recipe of UniID: for identity alone, one branch per run, the target as its own reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, MismatchError
from ...mechanisms.decoupled import SiteProjections
from ...placeholders import CLASS_WORD
from ..common import head_width
from ..method import AdapterContext, BatchFeatures, Encoded, Recipe
from .config import ENCODERS, UniIDConfig, branches
from .encoder import UniIDEncoder


def sizes(context: AdapterContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that the base model and the branch fix, and default sizes that suit them."""
    text_widths, facts = context.text_widths, {"stage_widths": context.stage_widths}
    if context.branch == "adapter":
        width = min(context.context_width, UniIDConfig.adapter_width)
        width = context.settings.get("adapter_width", width)
        return {**facts, "text_widths": ()}, {"adapter_width": width, "head_width": head_width(width)}
    names = ENCODERS[: len(text_widths)]
    if set(names) != set(text_widths):
        raise ConfigError(
            f"UniID's text branch is for the text encoders l and g of SD1.5 and SDXL; this base has {', '.join(text_widths)}. Set "
            "adapter.branch to 'adapter', or train an IDAdapter."
        )
    widths = tuple(text_widths[name] for name in names)
    sizes = {
        "text_hidden": min(2 * max(widths), UniIDConfig.text_hidden),
        "head_width": head_width(*widths),
    }
    return {**facts, "text_widths": widths, "adapter_tokens": 0}, sizes


def branch_of(config: UniIDConfig, branch: str) -> UniIDConfig:
    """Return the config of one branch of an adapter.

    Raises:
        MismatchError: the adapter has only the other branch.
    """
    there = config.has_adapter_branch if branch == "adapter" else config.has_text_branch
    if not there:
        raise MismatchError(
            f"has the {branches(config)} only, but adapter.branch is {branch!r}. Choose the file of that "
            "branch as adapter.start, or train the branch that is there."
        )
    return replace(config, text_widths=()) if branch == "adapter" else replace(config, adapter_tokens=0)


@torch.no_grad()
def start(layers: SiteProjections, key_values: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Copy the K/V weights of the UNet's cross-attention to the K/V projections, as published."""
    for number in layers.adapter_modules:
        pair = layers.pair(int(number))
        for linear, weight in zip((pair.to_k_ip, pair.to_v_ip), key_values[int(number)], strict=True):
            linear.weight.copy_(weight)


def encode(encoder: UniIDEncoder, config: UniIDConfig, features: BatchFeatures) -> Encoded:
    """Encode the features; rows without the identity get zeroed features."""
    keep = features.identity.to(features.embedding)
    embedding = features.embedding[:, -1] * keep[:, None]
    stages = tuple(stage * keep[:, None, None, None] for stage in features.stages)
    text, tokens = encoder(embedding, stages)
    return Encoded(tokens, None, text)


RECIPE = Recipe(
    prompt=f"a photo of a {CLASS_WORD}",
    known_by_target=True,
    sizes=sizes,
    encode=encode,
    defaults={
        "data": {"flip": False},
        "loss": {"identity": 0.0},
        "train": {
            "learning_rate": 1e-5,
            "weight_decay": 0.01,
            "drop_identity": 0.1,
            "drop_text": 0.0,
            "drop_both": 0.0,
        },
    },
    branches={"adapter": {}, "text": {"train": {"learning_rate": 1e-4}}},
    branch_of=branch_of,
    start=start,
)
