"""From photos of a person to `FaceFeatures`: find, choose, align and recognise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import FaceError, InputError, NoFaceFoundError, RecognizerError
from ..types import Face, FaceFeatures
from .align import align_face
from .detector import FaceAnalyzer, Search, order_faces, select_faces
from .images import Image, check_image, image_name

log = logging.getLogger(__name__)

ON_MISSING = ("error", "skip")
SMALL_BOX = 64  # pixels
WIDE, LARGE = (
    1.6,
    1024,
)  # sides of a photo to each other, and pixels of the longer one: from here on a face may be small in it
SMALL_EYE_DISTANCE = 20  # pixels
_CHUNK = 16  # crops per call of the recogniser

# ComfyUI has one size for all pictures of a batch, so what arrives here may not be what the user gave.
_CROPPED = (
    ". In a batch every photo but the first may have been scaled and cropped to the size of the first: crop or pad them to one shape "
    "before they are joined"
)
_SKIP = ". Or set on_missing to skip, to leave this photo out"

Recognizer = Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]


@dataclass(frozen=True, eq=False)
class Extraction:
    """Features and how they came about. `found` and `chosen` have one entry per photo."""

    features: FaceFeatures
    report: str
    found: tuple[tuple[Face, ...], ...]  # every face of each photo, in the order that `index` counts in
    chosen: tuple[tuple[Face, ...], ...]  # the faces of `features`; empty for a photo that was left out


def extract_features(
    images: Sequence[Image | Tensor],
    analyzer: FaceAnalyzer,
    recognizer: Recognizer | None,
    *,
    select: str = "largest",
    index: int = 0,
    on_missing: str = "error",
    recognizer_digest: str = "",
    progress: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> Extraction:
    """Features of the chosen face of each photo (or of all faces with select="all").

    `images`: photos of any sizes, in any form `check_image` takes. `select` and `index`: see `select_faces`.
    `recognizer` maps crops (F, 3, 112, 112), RGB in [-1, 1], float32, to the embedding (F, 512) and four stages;
    `recognizer_digest` names its weights. Without it the package's own recogniser gives the embedding, and there
    are no stages. `on_missing="skip"` leaves out photos without the wanted face. With select="all", a face that cannot
    be cut out is left out as long as the photo has another one.

    `progress` is called after each photo; `check` before each detection attempt and each call of the recogniser, to end
    the work by raising.

    The features are float32 on the CPU. Raises NoFaceFoundError or FaceError naming the photo, InputError for
    photos that are no images, NoFaceFoundError when every photo was skipped.
    """
    if on_missing not in ON_MISSING:
        raise InputError(f"on_missing must be one of {', '.join(ON_MISSING)}, got {on_missing!r}")
    if not images:
        raise InputError("no images were given; connect at least one photo of the person")
    order_faces([], select)
    if recognizer is None:
        analyzer.require_recognition()

    found: list[tuple[Face, ...]] = []
    chosen: list[tuple[Face, ...]] = []
    crops: list[Image] = []
    lines: list[str] = []
    for position, given in enumerate(images):
        image = check_image(given, position, len(images))
        name = image_name(image, position, len(images))
        search = analyzer.search(image, position, check)
        faces = order_faces(search.faces, select)
        found.append(tuple(faces))
        try:
            picked, new_crops, left_out = _pick(image, search, faces, select, index)
        except FaceError as error:
            if on_missing == "error":
                hint = ""
                if len(images) > 1:
                    hint = (_CROPPED if isinstance(error, NoFaceFoundError) else "") + _SKIP
                raise type(error)(f"{name}: {error}{hint}") from error
            chosen.append(())
            lines.append(f"{name}: skipped, {error}")
        else:
            chosen.append(tuple(picked))
            crops += new_crops
            lines += _describe(name, search.step, faces, picked, left_out)
        progress()

    if not crops:
        raise NoFaceFoundError("no photo shows a usable face.\n" + "\n".join(lines))
    crop_tensor = crops_to_tensor(crops)
    if recognizer is None:
        embedding = _embed(analyzer, crops, check)
        stages: tuple[Tensor, ...] = ()
        recognizer_digest = analyzer.recognizer_digest
    else:
        embedding, stages = _recognize(recognizer, crop_tensor, check)
    if not torch.isfinite(embedding).all():
        raise RecognizerError(
            "the face recogniser gave values that are not finite; run it in float32, or get its file again"
        )
    features = FaceFeatures(
        embedding=embedding,
        stages=stages,
        faces=tuple(face for faces in chosen for face in faces),
        recognizer=recognizer_digest,
        crops=crop_tensor,
    )
    return Extraction(features, "\n".join(lines), tuple(found), tuple(chosen))


def crops_to_tensor(crops: Sequence[Image]) -> Tensor:
    """Aligned crops (112, 112, 3), RGB uint8, as the recogniser's input (F, 3, 112, 112), float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).contiguous()


def _pick(
    image: Image, search: Search, faces: Sequence[Face], select: str, index: int
) -> tuple[list[Face], list[Image], list[str]]:
    """The chosen faces that can be cut out, their crops, and why others cannot (only where all were asked for)."""
    if not faces:
        raise NoFaceFoundError(_not_found(image, search))
    picked: list[Face] = []
    crops: list[Image] = []
    left_out: list[str] = []
    for face in select_faces(faces, select, index):
        try:
            crops.append(align_face(image, face.landmarks))
        except FaceError as error:
            if select != "all" or len(faces) == 1:
                raise
            left_out.append(f"face {faces.index(face)} left out, {error}")
        else:
            picked.append(face)
    if not picked:
        raise FaceError(f"none of {len(faces)} faces can be used: {'; '.join(left_out)}")
    return picked, crops, left_out


def _not_found(image: Image, search: Search) -> str:
    height, width = image.shape[:2]
    if search.too_small:
        return (
            f"the face in it is too small, about {search.too_small:.0f} px high; {SMALL_BOX} px and more make a good identity. Use "
            "a photo taken from nearer, or the same photo in its full size, cropped to head and shoulders"
        )
    advice = "Use an upright, unobstructed face; a photo from a phone may lie on its side"
    if max(height, width) >= WIDE * min(height, width) or max(height, width) > LARGE:
        advice = (
            "Is the face small in it? Crop the photo to head and shoulders. Otherwise use an upright, unobstructed face; a photo "
            "from a phone may lie on its side"
        )
    return f"no face found (looked {search.step}). {advice}"


def _embed(analyzer: FaceAnalyzer, crops: Sequence[Image], check: Callable[[], None]) -> Tensor:
    embeddings = []
    for crop in crops:
        check()
        embeddings.append(torch.from_numpy(analyzer.embed(crop)))
    return torch.stack(embeddings)


@torch.no_grad()
def _recognize(
    recognizer: Recognizer, crops: Tensor, check: Callable[[], None]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    embedding, stages = torch.empty(0), tuple[Tensor, ...]()
    for start in range(0, len(crops), _CHUNK):
        check()
        part, maps = recognizer(crops[start : start + _CHUNK])
        if start == 0:  # room for all at once: joining parts in the end would need it twice
            embedding, *others = (torch.empty(len(crops), *t.shape[1:]) for t in (part, *maps))
            stages = tuple(others)
        for whole, piece in zip((embedding, *stages), (part, *maps), strict=True):
            whole[start : start + _CHUNK] = piece
    return embedding, stages


def _describe(
    name: str, step: str, faces: Sequence[Face], picked: Sequence[Face], left_out: Sequence[str]
) -> list[str]:
    noun = "1 face" if len(faces) == 1 else f"{len(faces)} faces"
    lines = [f"{name}: {noun} found {step}"]
    lines += [f"  warning: {reason}" for reason in left_out]
    if len(faces) > len(picked) + len(left_out):
        used, last = faces.index(picked[0]), len(faces) - 1
        lines.append(f"  warning: several faces; used index {used} of 0 to {last}")
    for face in picked:
        person = ", ".join(str(fact) for fact in (face.sex, face.age) if fact is not None)
        lines.append(
            f"  face {faces.index(face)}: {face.width:.0f}x{face.height:.0f} px, score {face.score:.2f}"
            f"{f', {person}' if person else ''}"
        )
        if min(face.width, face.height) < SMALL_BOX or face.eye_distance < SMALL_EYE_DISTANCE:
            lines.append(
                f"  warning: small face ({face.width:.0f}x{face.height:.0f} px, eyes {face.eye_distance:.0f} px apart); "
                "the identity will be weak"
            )
    for line in lines:
        if "warning" in line:
            log.warning("%s:%s", name, line.removeprefix("  warning:"))
    return lines
