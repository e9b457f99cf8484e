"""Pictures as inputs of networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .pictures import PictureSet

FACE_WEIGHT = 3.0  # of an error inside the box of the head, against 1 outside
FEATURES_WEIGHT = 8.0  # of an error near eyes, nose and mouth
Numbers = npt.NDArray[np.int64]


def as_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Convert pictures (B, H, W, 3), uint8, to (B, 3, H, W), float32 in -1..1, in the channels-last memory format."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def face_weights(
    boxes: npt.NDArray[np.float32],
    side: int,
    cell: int = 1,
    landmarks: npt.NDArray[np.float32] | None = None,
) -> Tensor:
    """Weights (N, side, side) of errors, of mean 1 in each picture: larger in the box of the head, where expressions are.

    Args:
        boxes: (N, 4) left, top, right, bottom in pixels.
        side: cells along a side of a picture, of `cell` pixels each.
        landmarks: (N, 5, 2) in pixels. Given them, weights are larger still between eyes and mouth.
    """
    weights = 1 + (FACE_WEIGHT - 1) * _inside(boxes, side, cell)
    if landmarks is not None:
        weights += (FEATURES_WEIGHT - FACE_WEIGHT) * _inside(_feature_boxes(landmarks), side, cell)
    return weights / weights.mean((1, 2), keepdim=True)


def _feature_boxes(landmarks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Boxes (N, 4) of eyes, nose and mouth, with a margin for brows and chin."""
    least, most = landmarks.min(1), landmarks.max(1)
    margin = 0.4 * (most - least).max(1, keepdims=True)
    return np.concatenate([least - margin, most + margin], 1)


def _inside(boxes: npt.NDArray[np.float32], side: int, cell: int) -> Tensor:
    """1 for cells (N, side, side) whose centre is inside the box (N, 4), 0 for others."""
    centers = (np.arange(side) + 0.5) * cell
    left, top, right, bottom = boxes[:, :, None].transpose(1, 0, 2)
    across, down = (centers > left) & (centers < right), (centers > top) & (centers < bottom)
    return torch.from_numpy(down[:, :, None] & across[:, None, :]).float()


class Pool:
    """Several groups of pictures, concatenated. People of different groups have different numbers."""

    def __init__(self, sets: Sequence[PictureSet]) -> None:
        self.sets = tuple(sets)
        self.starts = np.cumsum([0, *(len(part) for part in sets)])
        firsts = np.cumsum([0, *(int(part.people.max()) + 1 for part in sets)])
        self.people: Numbers = np.concatenate(
            [part.people + first for part, first in zip(sets, firsts, strict=False)]
        )
        self.landmarks = np.concatenate([part.landmarks for part in sets])
        self.boxes = np.concatenate([part.boxes for part in sets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pixels(self, numbers: Numbers) -> npt.NDArray[np.uint8]:
        """Return the pictures (B, H, W, 3), uint8, with these numbers (B,)."""
        return np.stack([self._one(int(number)) for number in numbers])

    def labels(self, factor: str, classes: Sequence[str]) -> Numbers:
        """Return the class of each picture (N,), as an index into `classes`."""
        return np.concatenate([part.labels(factor, classes) for part in self.sets])

    def where(self, **classes: str) -> Numbers:
        """Return the numbers of the pictures whose factors have these classes."""
        found = [part.where(**classes) + start for part, start in zip(self.sets, self.starts, strict=False)]
        return np.concatenate(found)

    def _one(self, number: int) -> npt.NDArray[np.uint8]:
        part = int(np.searchsorted(self.starts, number, "right")) - 1
        return np.asarray(self.sets[part].pixels[number - self.starts[part]])
