"""Find the source of non-finite numbers and give advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .config import TrainConfig
from .samples import Batch


def not_finite(done: Sequence[tuple[Batch, Mapping[str, Tensor]]]) -> str:
    """A sentence about NaN or infinite losses and their photos; empty if there are none."""
    if all(torch.isfinite(torch.stack([losses["loss"] for _, losses in done])).tolist()):
        return ""
    named: list[str] = []
    others: list[str] = []
    for batch, losses in done:
        broken = ~torch.isfinite(losses["mse"]) | (losses["counts"] & ~torch.isfinite(losses["cosine"]))
        for source, timestep, is_broken in zip(
            batch.sources, batch.timesteps.tolist(), broken.tolist(), strict=True
        ):
            (named if is_broken else others).append(f"{source} (timestep {timestep})")
    return f"the loss is not finite, from {', '.join(named or others)}. Look at {'this photo' if len(named) == 1 else 'these photos'}."


def advice_on_numbers(train: TrainConfig) -> str:
    """Advice on avoiding non-finite numbers with these settings."""
    steps = [f"lower train.learning_rate ({train.learning_rate:g})"]
    steps.append(
        f"lower train.max_grad_norm ({train.max_grad_norm:g})"
        if train.max_grad_norm
        else "set train.max_grad_norm (1.0 is a common value)"
    )
    if not train.lr_warmup_steps:
        steps.append("set train.lr_warmup_steps")
    if train.mixed_precision != "no":
        steps.append(
            f'set train.mixed_precision = "no", which has 24 significant bits where {train.mixed_precision} has 8'
        )
    listed = f"{', '.join(steps[:-1])}, or {steps[-1]}."
    return listed[0].upper() + listed[1:]


__all__ = ["advice_on_numbers", "not_finite"]
