"""Measure one photo and judge it: first facts, which are expensive, then a verdict by limits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FaceError, InputError, RecognizerError
from ..extra import require
from ..faces.align import align_face
from ..faces.detector import FaceAnalyzer, open_analyzer, order_faces
from ..faces.features import crops_to_tensor
from ..faces.images import MIN_SIDE, Image
from ..faces.iresnet import EMBEDDING_WIDTH, IResNet, digest, load_iresnet
from ..faces.pose import estimate_pose
from ..files import file_digest
from ..types import Face
from .entries import ListedPhoto
from .index import read_photo
from .photos import decode_with_note
from .rows import OK

RIVAL = 0.5
"""A photo shows several people if the area of a second face is at least this share of the largest one's."""


@dataclass(frozen=True)
class Limits:
    """Requirements for a usable photo. Each is an option of `scan`."""

    min_side: int = 256  # shorter side of the photo, pixels
    min_face: int = 64  # shorter side of the face's box, pixels
    min_fraction: float = 0.02  # share of the photo covered by the face's box
    min_sharpness: float = 15.0  # variance of the Laplacian of the aligned crop
    max_yaw: float = 60.0  # degrees to either side
    max_pitch: float = 50.0  # degrees up or down
    min_cosine: float = 0.3  # to the median embedding of the person's photos


@dataclass(frozen=True)
class Measured:
    """The facts of one photo, rounded, so that they survive a round trip through a file."""

    sha256: str = ""
    size: int = 0  # bytes
    width: int = 0
    height: int = 0
    phash: str = ""
    faces: int = 0
    rival: float = 0.0  # area of the second largest face over the largest one's
    box: tuple[float, ...] | None = None
    landmarks: tuple[tuple[float, ...], ...] | None = None
    score: float = 0.0
    face_fraction: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0
    sharpness: float = 0.0
    sex: str = ""  # M, F or ""
    status: str = ""  # corrupt or no_face if no further fact is needed
    reason: str = ""
    note: str = ""  # a remark that scans count: a problem with the photo's colours


class Models:
    """The loaded networks for measuring photos."""

    def __init__(self, package: Path, recognizer: Path | None, provider: str) -> None:
        # One thread: many processes do this at once, and results must not depend on the number of threads.
        self.analyzer: FaceAnalyzer = open_analyzer(
            package, provider, recognition=recognizer is None, threads=1
        )
        self.recognizer: IResNet | None = None if recognizer is None else load_iresnet(recognizer)

    def facts(self) -> dict[str, Any]:
        """Identification of these networks in an index. Recognisers are named as in features and adapters."""
        files = self.analyzer.package.models
        return {
            "face_package": {task: file_digest(path) for task, path in sorted(files.items())},
            "recognizer": self.analyzer.recognizer_digest
            if self.recognizer is None
            else digest(self.recognizer),
        }

    def embed(self, crop: Image) -> NDArray[np.float32]:
        """The embedding (512,) of an aligned crop, not normalised."""
        if self.recognizer is None:
            embedding = self.analyzer.embed(crop)
        else:
            with torch.no_grad():
                embedding = self.recognizer(crops_to_tensor([crop]))[0][0].numpy()
        if embedding.shape != (EMBEDDING_WIDTH,) or not np.isfinite(embedding).all():
            raise RecognizerError(
                f"the face recogniser gave an embedding of shape {embedding.shape}, or one that is not finite; "
                f"({EMBEDDING_WIDTH},) finite numbers are needed. Choose another recogniser, or get its file again."
            )
        return embedding


def measure(photo: ListedPhoto, root: Path, models: Models) -> tuple[Measured, NDArray[np.float32] | None]:
    """Measure a photo: its facts, and the embedding of its largest face, if any. An unreadable photo has facts, too."""
    if photo.problem:
        return Measured(status="corrupt", reason=photo.problem), None
    try:
        content = read_photo(root, photo.source, photo.offset, photo.size)
    except OSError as error:
        return Measured(status="corrupt", reason=f"cannot be read: {error.strerror or error}"), None
    known: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    try:
        image, note = decode_with_note(content)
    except InputError as error:
        return Measured(**known, status="corrupt", reason=str(error)), None
    known |= {"width": image.shape[1], "height": image.shape[0], "phash": _phash(image), "note": note}
    # The face models accept no smaller images; `judge` rejects these anyway.
    faces = order_faces(models.analyzer.detect(image), "largest") if min(image.shape[:2]) >= MIN_SIDE else []
    if not faces:
        return Measured(**known, status="no_face", reason="no face was found"), None
    known |= _of_face(faces, image)
    try:
        crop = align_face(image, faces[0].landmarks)
    except FaceError as error:
        return Measured(**known, status="no_face", reason=f"no whole face: {error}"), None
    return Measured(**known, sharpness=sharpness(crop)), models.embed(crop)


def judge(facts: Measured, limits: Limits) -> tuple[str, str]:
    """A photo's status and the reason. The first failed requirement counts."""
    if facts.status == "corrupt":
        return facts.status, facts.reason
    side = min(facts.width, facts.height)
    if side < limits.min_side:
        return (
            "too_small",
            f"{facts.width}x{facts.height} px, at least {limits.min_side} are needed on each side",
        )
    if facts.status or facts.box is None:
        return facts.status, facts.reason
    if facts.rival >= RIVAL:
        return (
            "many_faces",
            f"{facts.faces} faces, the second is {facts.rival:.0%} of the largest; below {RIVAL:.0%} is allowed",
        )
    x1, y1, x2, y2 = facts.box
    face = min(x2 - x1, y2 - y1)
    if face < limits.min_face:
        return "small_face", f"the face is {face:.0f} px, at least {limits.min_face} are needed"
    if facts.face_fraction < limits.min_fraction:
        return (
            "small_face",
            f"the face covers {facts.face_fraction:.1%} of the photo, at least {limits.min_fraction:.1%} are needed",
        )
    for name, angle, most in (("yaw", facts.yaw, limits.max_yaw), ("pitch", facts.pitch, limits.max_pitch)):
        if abs(angle) > most:
            return "extreme_pose", f"{name} is {angle:.0f} degrees, at most {most:.0f} are allowed"
    if facts.sharpness < limits.min_sharpness:
        return (
            "blur",
            f"the crop's sharpness is {facts.sharpness:.1f}, at least {limits.min_sharpness:g} is needed",
        )
    return OK, ""


def sharpness(crop: Image) -> float:
    """Variance of the Laplacian of a crop (H, W, 3), RGB uint8, in grey levels: low for blurred images."""
    grey = crop.astype(np.float64) @ [0.299, 0.587, 0.114]
    middle = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return round(float(laplacian.var()), 2)


def _of_face(faces: list[Face], image: Image) -> Mapping[str, Any]:
    face = faces[0]
    height, width = image.shape[:2]
    x1, y1, x2, y2 = face.box
    covered = max(min(x2, width) - max(x1, 0), 0) * max(min(y2, height) - max(y1, 0), 0)
    pose = estimate_pose(face.landmarks)
    return {
        "faces": len(faces),
        "rival": round(faces[1].area / face.area, 4) if len(faces) > 1 else 0.0,
        "box": tuple(round(value, 2) for value in face.box),
        "landmarks": tuple((round(x, 2), round(y, 2)) for x, y in face.landmarks),
        "score": round(face.score, 4),
        "face_fraction": round(covered / (width * height), 5),
        "yaw": round(pose.yaw, 2),
        "pitch": round(pose.pitch, 2),
        "sex": face.sex or "",
    }


def _phash(image: Image) -> str:
    from PIL import Image as Pillow

    hasher: Callable[[Any], Any] = require("imagehash").phash
    return str(hasher(Pillow.fromarray(image)))
