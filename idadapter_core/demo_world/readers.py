"""A classifier of the factors of a picture. It measures how well pictures follow their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import ACCESSORIES, BACKGROUNDS, CLOTHES, DIRECTIONS, EXPRESSIONS, STYLES
from .identity import SEXES
from .shipped import load_network, save_network

READ_FACTORS: Mapping[str, tuple[str, ...]] = {
    "expression": tuple(EXPRESSIONS),
    "direction": DIRECTIONS,
    "background": BACKGROUNDS,
    "accessory": ACCESSORIES,
    "clothes": tuple(CLOTHES),
    "style": STYLES,
    "sex": SEXES,
}
READER_SIZE = 128
WIDTHS = (32, 64, 96, 128)
_FEATURE_CELLS = 4  # along a side; keeps where in the picture a feature is


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(hidden)))


def _down(inside: int, outside: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


class Trunk(nn.Module):
    """Maps pictures (B, 3, S, S) to the features (B, C, H, W) of four stages, of sides S/2, S/4, S/8 and S/16."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.PixelUnshuffle(2), _down(12, a, 1), _Block(a)),
                nn.Sequential(_down(a, b), _Block(b), _Block(b)),
                nn.Sequential(_down(b, c), _Block(c), _Block(c)),
                nn.Sequential(_down(c, d), _Block(d)),
            ]
        )

    def forward(self, pictures: Tensor) -> list[Tensor]:
        seen = []
        for stage in self.stages:
            pictures = stage(pictures)
            seen.append(pictures)
        return seen


class Reader(nn.Module):
    """Maps pictures (B, 3, 128, 128), RGB in -1..1, to logits (B, K) of the K classes of each factor in `READ_FACTORS`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(WIDTHS)
        classes = sum(len(names) for names in READ_FACTORS.values())
        self.head = nn.Linear(WIDTHS[-1] * _FEATURE_CELLS**2, classes)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        pooled = F.adaptive_avg_pool2d(self.trunk(pictures)[-1], _FEATURE_CELLS).flatten(1)
        counts = [len(classes) for classes in READ_FACTORS.values()]
        return dict(zip(READ_FACTORS, self.head(pooled).split(counts, 1), strict=True))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> dict[str, list[str]]:
        """Return the most likely class of each factor for each picture (B, 3, 128, 128)."""
        return {
            factor: [READ_FACTORS[factor][k] for k in scores.argmax(1).tolist()]
            for factor, scores in self(pictures).items()
        }


def save_reader(reader: Reader, path: Path) -> None:
    """Write a reader in half precision."""
    save_network(reader, "reader", path)


def load_reader(path: Path) -> Reader:
    """Load a reader, in float32 and eval mode.

    Raises:
        CheckpointError: the file is missing, damaged or of another network.
    """
    return load_network(Reader(), "reader", path)
