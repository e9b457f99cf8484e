"""Trains face recognisers: that of the face package, and the second one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...faces.align import TEMPLATE_SIZE, align_face, similarity_transform
from ...faces.features import crops_to_tensor
from .batches import Numbers, Pool
from .fitting import fit
from .measures import recognition
from .settings import TrainingSchedule

SCALE = 32.0  # of cosines, for the softmax
MARGIN = 0.3  # by which the cosine with the person's own direction must exceed the others
MARGIN_RAMP = (300, 1500)  # steps between which the margin rises from 0
JITTER = 1.8  # standard deviation of the landmarks in pixels, as errors of a detector

Embed = Callable[[nn.Module, Tensor], Tensor]


class _Classifier(nn.Module):
    """A recogniser, with a direction in its embedding space for each person of the training."""

    network: nn.Module

    def __init__(self, network: nn.Module, people: int, width: int) -> None:
        super().__init__()
        self.network = network
        self.directions = nn.Parameter(torch.randn(people, width) * 0.05)


def train_recognizer(
    network: nn.Module,
    embed: Embed,
    width: int,
    pool: Pool,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    seed: int,
    log: Callable[[str], None],
) -> nn.Module:
    """Train `network`, whose `embed(network, crops)` gives embeddings (B, width), on the people of a pool.

    Softmax over people with a margin between cosines (CosFace, arXiv:1801.09414).
    """
    torch.manual_seed(seed)

    def loss(module: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        assert isinstance(module, _Classifier)
        nn.Module.train(module.network)  # IResNet.train keeps it in eval mode
        numbers = rng.integers(len(pool), size=schedule.batch)
        crops = varied_crops(pool, numbers, rng)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = embed(module.network, crops)
        cosines = F.normalize(embeddings.float()) @ F.normalize(module.directions).T
        people = torch.from_numpy(pool.people[numbers])
        margin = MARGIN * float(np.clip((step - MARGIN_RAMP[0]) / (MARGIN_RAMP[1] - MARGIN_RAMP[0]), 0, 1))
        return F.cross_entropy(SCALE * (cosines - margin * F.one_hot(people, cosines.shape[1])), people)

    classifier = _Classifier(network, int(pool.people.max()) + 1, width)
    classifier = classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = fit(classifier, loss, schedule, checkpoint, seed=seed, weight_decay=0.05, log=log)
    assert isinstance(average, _Classifier)
    return average.network.requires_grad_(False)


def varied_crops(pool: Pool, numbers: Numbers, rng: np.random.Generator) -> Tensor:
    """Return augmented aligned crops (B, 3, 112, 112) in -1..1: errors of a detector, mirrored, other brightness and colours, blur."""
    crops = []
    for pixels, points in zip(pool.pixels(numbers), pool.landmarks[numbers], strict=True):
        crop = _crop(pixels, points + rng.normal(0, JITTER, (5, 2)))
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    batch = crops_to_tensor(crops).contiguous(memory_format=torch.channels_last)
    count = len(batch)

    def random(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32))

    batch = batch * random(0.75, 1.25) + random(-0.2, 0.2)
    gray = batch.mean(1, keepdim=True)
    batch = gray + (batch - gray) * random(0.5, 1.3) * (random(0, 1) > 0.1)
    if rng.random() < 0.25:
        batch = F.interpolate(F.avg_pool2d(batch, 2), scale_factor=2, mode="bilinear")
    return batch.clamp(-1, 1)


def _crop(pixels: npt.NDArray[np.uint8], points: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    matrix = similarity_transform(points)
    return np.asarray(
        cv2.warpAffine(pixels, matrix, (TEMPLATE_SIZE, TEMPLATE_SIZE), borderValue=0.0), np.uint8
    )


def aligned_crops(pixels: npt.NDArray[np.uint8], landmarks: npt.NDArray[np.floating]) -> Tensor:
    """Cut aligned crops (B, 3, 112, 112) in -1..1 from pictures (B, H, W, 3), as the face package does."""
    return crops_to_tensor([align_face(one, points) for one, points in zip(pixels, landmarks, strict=True)])


@torch.no_grad()
def embeddings_of(
    network: nn.Module,
    embed: Embed,
    pixels: npt.NDArray[np.uint8],
    landmarks: npt.NDArray[np.floating],
    batch: int = 64,
) -> npt.NDArray[np.float32]:
    """Compute the embeddings (N, D) of pictures (N, H, W, 3), uint8."""
    rows = [
        embed(network, aligned_crops(pixels[start : start + batch], landmarks[start : start + batch]))
        for start in range(0, len(pixels), batch)
    ]
    return np.asarray(torch.cat(rows).numpy(), np.float32)


def recognizer_scores(network: nn.Module, embed: Embed, pools: dict[str, Pool]) -> dict[str, float]:
    """Return the area under the ROC curve and the rank-1 accuracy in each pool."""
    scores: dict[str, float] = {}
    for name, pool in pools.items():
        everything = np.arange(len(pool))
        rows = embeddings_of(network, embed, pool.pixels(everything), pool.landmarks)
        scores |= {f"{name}_{key}": value for key, value in recognition(rows, pool.people).items()}
    return scores


def first_of(result: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
    """Return the embedding from the output of an IResNet."""
    return result[0]
