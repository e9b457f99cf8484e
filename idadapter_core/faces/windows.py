"""Windows of a photo for the detector (tiles, or the photo with a border), and the faces detected in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .align import MIN_EYE_DISTANCE

_OVERLAP = 0.25  # fraction of a tile, so that a face cut by one tile is whole in its neighbour
_LONGEST_PADDED = 1280  # larger photos are shrunk before a border is added; the detector reads 640 px at most


@dataclass(frozen=True, eq=False)
class DetectedFace:
    """A detected face, in pixels of its window."""

    box: NDArray[np.floating]  # (4,) x1, y1, x2, y2
    landmarks: NDArray[np.floating]  # (5, 2)
    score: float

    @property
    def height(self) -> float:
        return float(self.box[3] - self.box[1])

    @property
    def is_usable(self) -> bool:
        return self._is_sane and self._eye_distance >= MIN_EYE_DISTANCE

    @property
    def is_tiny(self) -> bool:
        """Whether the face has too few pixels."""
        return self._is_sane and self._eye_distance < MIN_EYE_DISTANCE

    @property
    def _is_sane(self) -> bool:
        if not (np.isfinite(self.box).all() and np.isfinite(self.landmarks).all()):
            return False
        x1, y1, x2, y2 = self.box
        return bool(x2 > x1 and y2 > y1)

    @property
    def _eye_distance(self) -> float:
        return float(np.linalg.norm(self.landmarks[1] - self.landmarks[0]))

    def moved(self, by: tuple[float, float], scale: float) -> DetectedFace:
        """Return the face with its coordinates shifted by `by`, then multiplied by `scale`."""
        x, y = by
        return DetectedFace((self.box + [x, y, x, y]) * scale, (self.landmarks + [x, y]) * scale, self.score)


def tile_starts(length: int, side: int) -> list[int]:
    """Return the start positions of tiles along a side of the photo; the last tile ends at the photo's edge."""
    if length <= side:
        return [0]
    count = 1 + -(-(length - side) // round(side * (1 - _OVERLAP)))
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def is_cut(face: DetectedFace, tile: tuple[int, int, int], photo: tuple[int, int]) -> bool:
    """Return whether the edge of a tile (left, top, side), other than the edge of the photo (width, height), cuts a face."""
    (left, top, side), (width, height) = tile, photo
    x1, y1, x2, y2 = face.box
    cut = (
        (left > 0 and x1 <= left),
        (top > 0 and y1 <= top),
        (left + side < width and x2 >= left + side),
        (top + side < height and y2 >= top + side),
    )
    return any(cut)


def likeness(one: DetectedFace, other: DetectedFace) -> float:
    """Return the intersection over union of two faces' boxes; 0 for a degenerate box."""
    low, high = np.maximum(one.box[:2], other.box[:2]), np.minimum(one.box[2:], other.box[2:])
    shared = float(np.prod(np.clip(high - low, 0, None)))
    union = float(np.prod(one.box[2:] - one.box[:2]) + np.prod(other.box[2:] - other.box[:2])) - shared
    return shared / union if union > 0 and np.isfinite(union) else 0.0


def bordered(bgr: NDArray[np.uint8], share: float) -> tuple[NDArray[np.uint8], float, tuple[int, int]]:
    """Add a black border to the photo, downscaled if large. Return it with the scale and the border's width and height."""
    import cv2

    scale = min(1.0, _LONGEST_PADDED / max(bgr.shape[:2]))
    if scale < 1:
        bgr = np.asarray(cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    x, y = round(bgr.shape[1] * share), round(bgr.shape[0] * share)
    padded = cv2.copyMakeBorder(bgr, y, y, x, x, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return np.asarray(padded, np.uint8), scale, (x, y)
