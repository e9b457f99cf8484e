"""Trains the autoencoder, and measures how well its pictures keep a person."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..readers import Reader
from .batches import Pool, as_tensor, face_weights
from .fitting import fit
from .settings import TrainingSchedule

FEATURE_STAGES = 3  # of the reader, whose features are compared
FEATURE_WEIGHT = 0.15
EDGE_WEIGHT = 0.5
SPREAD_WEIGHT = (
    0.05  # pulls each latent channel towards mean 0 and standard deviation 1, which suits a diffusion model
)
NOISE = 0.03  # standard deviation, added to latents, so that the decoder tolerates small errors of a diffusion model
SHIFT = 4  # largest shift in pixels, half a cell of the latents, so that no position in a cell is special
WHOLE_PICTURE = 0.32  # share of the steps


def train_autoencoder(
    pool: Pool,
    reader: Reader,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    seed: int,
    log: Callable[[str], None],
    trained: Autoencoder | None = None,
) -> Autoencoder:
    """Train an autoencoder on the pictures of a pool. The loss also compares features of `reader`.

    First all of a picture counts alike; after a share `WHOLE_PICTURE` of the steps, errors in the box of the head count more.

    Args:
        trained: an autoencoder whose decoder alone is trained further, with the weights of the later steps. The latents of all pictures
            stay as they are.
    """
    torch.manual_seed(seed)
    if trained is None:
        network, faces_from = Autoencoder(), WHOLE_PICTURE * schedule.steps
    else:
        network, faces_from = trained.requires_grad_(True), 0.0
        network.encoder.requires_grad_(False)
    reader = reader.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        assert isinstance(network, Autoencoder)
        numbers = rng.integers(len(pool), size=schedule.batch)
        pictures = as_tensor(pool.pixels(numbers))
        weights = torch.ones(len(pictures), 1, *pictures.shape[2:])
        if step >= faces_from:
            weights = face_weights(pool.boxes[numbers], pictures.shape[3])[:, None]
        if step % 2:
            pictures, weights = pictures.flip(3), weights.flip(3)
        shift = tuple(rng.integers(-SHIFT, SHIFT + 1, 2).tolist())
        pictures, weights = (torch.roll(values, shift, (2, 3)) for values in (pictures, weights))
        with torch.autocast("cpu", torch.bfloat16):
            latents = network.encode(pictures)
            back = network.decode(latents + NOISE * torch.randn_like(latents))
        return _difference(back.float(), pictures, weights, reader) + SPREAD_WEIGHT * _spread(latents.float())

    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = fit(network, loss, schedule, checkpoint, seed=seed, weight_decay=0.0, log=log)
    assert isinstance(average, Autoencoder)
    return average


def _spread(latents: Tensor) -> Tensor:
    """Squared distance of the channels from mean 0 and standard deviation 1."""
    return latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()


def _difference(back: Tensor, pictures: Tensor, weights: Tensor, reader: Reader) -> Tensor:
    """L1 difference of pixels, edges and the reader's features. The weights (B, 1, H, W) are those of pixels and edges."""
    wrong = back - pictures
    total = (wrong.abs() * weights).mean()
    for axis in (2, 3):
        edges = wrong.diff(dim=axis).abs() * weights.narrow(axis, 1, weights.shape[axis] - 1)
        total = total + EDGE_WEIGHT * edges.mean()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = _features(reader, pictures)
        found = _features(reader, back)
    for one, other in zip(found, wanted, strict=True):
        scale = other.float().square().mean().sqrt() + 1e-3
        total = total + FEATURE_WEIGHT / len(wanted) * F.l1_loss(one.float(), other.float()) / scale
    return total


def _features(reader: Reader, pictures: Tensor) -> list[Tensor]:
    seen = []
    for stage in list(reader.trunk.stages)[:FEATURE_STAGES]:
        pictures = stage(pictures)
        seen.append(pictures)
    return seen


@torch.no_grad()
def rebuilt(network: Autoencoder, pool: Pool, batch: int = 32) -> np.ndarray:
    """Return the reconstructions (N, H, W, 3), uint8, of all pictures of a pool."""
    parts = []
    for start in range(0, len(pool), batch):
        numbers = np.arange(start, min(start + batch, len(pool)))
        back = network(as_tensor(pool.pixels(numbers))).clamp(-1, 1)
        parts.append(((back + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def signal_to_noise(one: np.ndarray, other: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio, in dB, of pictures (N, H, W, 3), uint8."""
    errors = ((one.astype(np.float32) - other.astype(np.float32)) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(errors, 1e-6))).mean())


@torch.no_grad()
def latent_statistics(network: Autoencoder, pool: Pool, count: int = 256) -> dict[str, float]:
    """Return the smallest and largest standard deviation of a latent channel, and the largest mean, over `count` pictures."""
    numbers = np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(np.int64)
    parts = np.array_split(numbers, max(1, len(numbers) // 32))
    latents = torch.cat([network.encode(as_tensor(pool.pixels(part))) for part in parts])
    deviations = latents.std((0, 2, 3))
    return {
        "least_deviation": round(float(deviations.min()), 3),
        "largest_deviation": round(float(deviations.max()), 3),
        "largest_mean": round(float(latents.mean((0, 2, 3)).abs().max()), 3),
    }
