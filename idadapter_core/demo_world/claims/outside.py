"""An outside judge of likeness: dlib's networks, trained on photos of real people by others, where they are installed.

`pip install dlib-bin face_recognition_models` (not part of this project) adds its numbers to a measurement.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

ENLARGED = 4  # dlib's landmarks need larger pictures than the demo world's
BOX = 2.0  # side of dlib's box, relative to the distance between eyes or between eyes and mouth
MODELS = ("shape_predictor_68_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")


class OutsideJudge:
    """dlib's landmarks and embeddings."""

    def __init__(self, dlib: Any, folder: Path) -> None:
        self._dlib = dlib
        shape, network = (str(folder / name) for name in MODELS)
        self._shape, self._network = dlib.shape_predictor(shape), dlib.face_recognition_model_v1(network)

    @classmethod
    def find(cls) -> OutsideJudge | None:
        """Open it; None where dlib or its models are not installed."""
        models = importlib.util.find_spec("face_recognition_models")
        if models is None or models.origin is None or importlib.util.find_spec("dlib") is None:
            return None
        folder = Path(models.origin).parent / "models"
        if not all((folder / name).is_file() for name in MODELS):
            return None
        return cls(importlib.import_module("dlib"), folder)

    def directions(
        self, pictures: npt.NDArray[np.uint8], landmarks: Sequence[npt.NDArray[np.float32] | None]
    ) -> npt.NDArray[np.float32]:
        """Embeddings of unit length (N, 128) of pictures (N, H, W, 3), RGB, with known landmarks (5, 2); NaN without them."""
        rows = np.full((len(pictures), 128), np.nan, np.float32)
        for number, points in enumerate(landmarks):
            if points is not None:
                row = self._embed(pictures[number], points)
                rows[number] = row / np.linalg.norm(row)
        return rows

    def _embed(
        self, picture: npt.NDArray[np.uint8], points: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        large = Image.fromarray(picture).resize(
            (picture.shape[1] * ENLARGED, picture.shape[0] * ENLARGED), Image.Resampling.BICUBIC
        )
        eyes, mouth = points[:2].mean(0), points[3:].mean(0)
        size = BOX * max(np.linalg.norm(points[1] - points[0]), np.linalg.norm(mouth - eyes))
        left, top = (eyes + mouth) / 2 - size / 2
        box = self._dlib.rectangle(
            *(round(ENLARGED * float(x)) for x in (left, top, left + size, top + size))
        )
        pixels = np.asarray(large)
        found = self._network.compute_face_descriptor(pixels, self._shape(pixels, box))
        return np.asarray(found)
