"""A network with the interface of insightface's `genderage`: scores of female and male, and age / 100, from a square around the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import SEXES, Person
from .batches import Numbers, Pool
from .fitting import fit
from .settings import TrainingSchedule

SIDE = 96  # pixels, as insightface expects
AROUND = 1.5  # side of the square, in sides of the face's box
WIDTHS = (16, 32, 48, 64)
JITTER = 0.06  # standard deviation of the box's edges, relative to its side


class SexAndAge(nn.Module):
    """Maps squares (B, 3, 96, 96), RGB, (pixel - 127.5) / 128, to (B, 3): logits of female and male, and age / 100."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *WIDTHS)
        self.convs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                for before, width in zip(inputs, WIDTHS, strict=False)
            )
        )
        self.last = nn.Linear(WIDTHS[-1] * 9, 3)

    def forward(self, squares: Tensor) -> Tensor:
        seen: Tensor = self.last(F.avg_pool2d(self.convs(squares), 2).flatten(1))
        return seen


def squares(pixels: npt.NDArray[np.uint8], boxes: npt.NDArray[np.floating]) -> Tensor:
    """Cut the squares that insightface uses around boxes (B, 4) from pictures (B, H, W, 3). Returns the input of the network (B, 3, 96, 96)."""
    cut = []
    for picture, (x1, y1, x2, y2) in zip(pixels, boxes, strict=True):
        scale = SIDE / (max(x2 - x1, y2 - y1) * AROUND)
        middle = np.array([(x1 + x2) / 2, (y1 + y2) / 2]) * scale
        matrix = np.array([[scale, 0, SIDE / 2 - middle[0]], [0, scale, SIDE / 2 - middle[1]]])
        cut.append(cv2.warpAffine(picture, matrix, (SIDE, SIDE), borderValue=0.0))
    return (torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() - 127.5) / 128


def train_sex_and_age(
    pool: Pool, schedule: TrainingSchedule, checkpoint: Path, *, seed: int, log: Callable[[str], None]
) -> SexAndAge:
    """Train the network on the pictures of a pool."""
    torch.manual_seed(seed)
    sexes, ages = (torch.from_numpy(values) for values in _truth(pool))

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        network.train()
        numbers = rng.integers(len(pool), size=schedule.batch)
        boxes = pool.boxes[numbers]
        side = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
        batch = squares(pool.pixels(numbers), boxes + rng.normal(0, JITTER, boxes.shape) * side)
        if step % 2:
            batch = batch.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            seen = network(batch.contiguous(memory_format=torch.channels_last))
        chosen = torch.from_numpy(numbers)
        return F.cross_entropy(seen[:, :2].float(), sexes[chosen]) + 5 * F.l1_loss(
            seen[:, 2].float(), ages[chosen]
        )

    network = SexAndAge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = fit(network, loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(average, SexAndAge)
    return average


def _truth(pool: Pool) -> tuple[Numbers, npt.NDArray[np.float32]]:
    """Return the sex (N,), 0 for women and 1 for men as in insightface, and age / 100 (N,)."""
    ages = {
        seed: Person.sample(seed).age for part in pool.sets for seed in {fact.person for fact in part.facts}
    }
    facts = [fact for part in pool.sets for fact in part.facts]
    return pool.labels("sex", SEXES), np.array([ages[fact.person] / 100 for fact in facts], np.float32)


@torch.no_grad()
def sex_and_age_scores(network: Callable[[Tensor], Tensor], pool: Pool) -> dict[str, float]:
    """Return the share of pictures whose sex is right, and the mean error of the age in years."""
    sexes, ages = _truth(pool)
    seen = torch.cat(
        [
            network(squares(pool.pixels(part), pool.boxes[part]))
            for part in np.array_split(np.arange(len(pool)), max(1, len(pool) // 64))
        ]
    ).numpy()
    return {
        "sex": round(float((seen[:, :2].argmax(1) == sexes).mean()), 4),
        "age_error": round(float(np.abs(seen[:, 2] - ages).mean() * 100), 2),
    }
