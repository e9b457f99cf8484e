"""Trains the classifier of factors, and measures its accuracy on unseen people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..readers import READ_FACTORS, Reader
from .batches import Pool, as_tensor
from .fitting import fit
from .settings import TrainingSchedule

SHIFT = 6  # largest shift in pixels


def train_reader(
    pool: Pool, schedule: TrainingSchedule, checkpoint: Path, *, seed: int, log: Callable[[str], None]
) -> Reader:
    """Train a reader on the pictures of a pool."""
    torch.manual_seed(seed)
    labels = {
        factor: torch.from_numpy(pool.labels(factor, classes)) for factor, classes in READ_FACTORS.items()
    }

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        network.train()
        numbers = rng.integers(len(pool), size=schedule.batch)
        pictures = augmented(as_tensor(pool.pixels(numbers)), rng)
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(pictures)
        chosen = torch.from_numpy(numbers)
        terms = [
            F.cross_entropy(scores[factor].float(), labels[factor][chosen], label_smoothing=0.02)
            for factor in READ_FACTORS
        ]
        return torch.stack(terms).sum()

    reader = Reader().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = fit(reader, loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(average, Reader)
    return average


def augmented(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift pictures (B, 3, H, W), blur some and add noise, as in generated pictures, without changing their factors."""
    dx, dy = rng.integers(-SHIFT, SHIFT + 1, 2)
    pictures = F.pad(pictures, (SHIFT,) * 4, mode="replicate")
    size = pictures.shape[-1] - 2 * SHIFT
    pictures = pictures[:, :, SHIFT + dy : SHIFT + dy + size, SHIFT + dx : SHIFT + dx + size]
    if rng.random() < 0.3:
        pictures = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
    amount = torch.from_numpy(rng.random(len(pictures)).astype(np.float32) * 0.08)
    return pictures + amount[:, None, None, None] * torch.randn_like(pictures)


@torch.no_grad()
def reader_scores(reader: Reader, pool: Pool, batch: int = 64) -> dict[str, float]:
    """Return the accuracy of each factor."""
    right = dict.fromkeys(READ_FACTORS, 0)
    labels = {factor: pool.labels(factor, classes) for factor, classes in READ_FACTORS.items()}
    for start in range(0, len(pool), batch):
        numbers = np.arange(start, min(start + batch, len(pool)))
        scores = reader(as_tensor(pool.pixels(numbers)))
        for factor, rows in scores.items():
            right[factor] += int((rows.argmax(1).numpy() == labels[factor][numbers]).sum())
    return {factor: round(count / len(pool), 4) for factor, count in right.items()}
