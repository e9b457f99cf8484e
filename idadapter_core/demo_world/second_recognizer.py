"""A second face recogniser, for evaluation. It has another architecture than the face package's and was trained on other people."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..faces.iresnet import CROP_SIZE
from .readers import WIDTHS, Trunk
from .shipped import load_network, save_network

EMBEDDING = 192
_CELLS = 3  # along a side; keeps where in the crop a feature is


class SecondRecognizer(nn.Module):
    """Maps aligned crops (B, 3, 112, 112), RGB in -1..1, to embeddings (B, 192), not normalised.

    Raises:
        InputError: the crops have another shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(WIDTHS)
        self.last = nn.Linear(WIDTHS[-1] * _CELLS**2, EMBEDDING, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING)

    def forward(self, crops: Tensor) -> Tensor:
        if crops.ndim != 4 or tuple(crops.shape[1:]) != (3, CROP_SIZE, CROP_SIZE):
            raise InputError(f"face crops must be (B, 3, {CROP_SIZE}, {CROP_SIZE}), got {tuple(crops.shape)}")
        embedding: Tensor = self.norm(
            self.last(F.adaptive_avg_pool2d(self.trunk(crops)[-1], _CELLS).flatten(1))
        )
        return embedding


def save_second_recognizer(network: SecondRecognizer, path: Path) -> None:
    """Write the recogniser in half precision."""
    save_network(network, "second recogniser", path)


def load_second_recognizer(path: Path) -> SecondRecognizer:
    """Load the recogniser, in float32 and eval mode.

    Raises:
        CheckpointError: the file is missing, damaged or of another network.
    """
    return load_network(SecondRecognizer(), "second recogniser", path)
