"""Trains a network that reads expressions in latents. It tells the base model in its training what its pictures express.

An expression fills a few cells of the latents, so it hardly counts in the error of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import EXPRESSIONS
from ..base import LATENT_CHANNELS
from ..shipped import load_network, save_network
from .fitting import fit
from .settings import TrainingSchedule

KIND = "latent reader"
CLASSES = tuple(EXPRESSIONS)
WIDTHS = (96, 96, 128, 128, 160, 160)  # every other block halves the sides
MOST_NOISE = 0.8  # added in training, for the blurred latents that it will read
DROPOUT, SMOOTHING = 0.2, 0.05


class LatentReader(nn.Module):
    """Maps latents (B, C, 16, 16) to logits (B, K) of the expressions."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (LATENT_CHANNELS, *WIDTHS[:-1])
        self.blocks = nn.Sequential(
            *(
                _block(width, out, 2 if number in (2, 4) else 1)
                for number, (width, out) in enumerate(zip(inputs, WIDTHS, strict=True))
            )
        )
        self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(WIDTHS[-1], len(CLASSES)))

    def forward(self, latents: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(latents).mean((2, 3)))
        return logits


def _block(width: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU())


def train_latent_reader(
    latents: npt.NDArray[np.float16],
    labels: npt.NDArray[np.int64],
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    seed: int,
    log: Callable[[str], None],
) -> LatentReader:
    """Train a reader on latents (N, C, h, w) and their expressions (N,), with noise and shifts of a cell."""
    torch.manual_seed(seed)
    classes = torch.from_numpy(labels)

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        numbers = rng.integers(len(latents), size=schedule.batch)
        shown = torch.from_numpy(latents[numbers].astype(np.float32))
        shown = shown + MOST_NOISE * torch.rand(len(shown), 1, 1, 1) * torch.randn_like(shown)
        shifts = [int(cells) for cells in rng.integers(-1, 2, 2)]
        with torch.autocast("cpu", torch.bfloat16):
            found = network(torch.roll(shown, shifts, (2, 3)))
        return F.cross_entropy(found.float(), classes[numbers], label_smoothing=SMOOTHING)

    reader = fit(LatentReader(), loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(reader, LatentReader)
    return reader


@torch.no_grad()
def accuracy(reader: LatentReader, latents: Tensor, labels: npt.NDArray[np.int64]) -> float:
    """Share of latents (N, C, h, w) whose expression is read right."""
    found = torch.cat([reader(part).argmax(1) for part in torch.split(latents, 64)])
    return round(float((found == torch.from_numpy(labels)).float().mean()), 3)


def save_latent_reader(reader: LatentReader, path: Path) -> None:
    """Write the network in half precision."""
    save_network(reader, KIND, path)


def load_latent_reader(path: Path) -> LatentReader:
    """Load the network, in float32 and eval mode.

    Raises:
        CheckpointError: the file is missing, damaged or of another network.
    """
    return load_network(LatentReader(), KIND, path)
