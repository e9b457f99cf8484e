"""Extracts `FaceFeatures` from photos of a person: detection, selection, alignment and recognition."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import FaceError, InputError, NoFaceFoundError, RecognizerError
from ..types import Face, FaceFeatures, Remark
from .align import align_face
from .detector import FaceAnalyzer, Search, order_faces, select_faces
from .images import Image, Origin, check_image, image_name

log = logging.getLogger(__name__)

ON_MISSING = ("error", "skip")
SMALL_BOX = 64  # pixels
WIDE, LARGE = (
    1.6,
    1024,
)  # aspect ratio of a photo, and pixels of its longer side, above which a face may be small in it
SMALL_EYE_DISTANCE = 20  # pixels
_CHUNK = 16  # crops per recogniser call

Recognizer = Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]


@dataclass(frozen=True, eq=False)
class Extraction:
    """Features and a report on their extraction. `found` and `chosen` have one entry per photo."""

    features: FaceFeatures
    report: str
    remarks: tuple[Remark, ...]  # the report as one or two sentences per photo and warning
    found: tuple[tuple[Face, ...], ...]  # every face of each photo, in the order used by `index`
    chosen: tuple[tuple[Face, ...], ...]  # the faces of `features`; empty for a skipped photo


def extract_features(
    images: Sequence[Image | Tensor],
    analyzer: FaceAnalyzer,
    recognizer: Recognizer | None,
    *,
    select: str = "largest",
    index: int = 0,
    on_missing: str = "error",
    recognizer_digest: str = "",
    origins: Sequence[Origin | None] = (),
    progress: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> Extraction:
    """Extract features of the selected face of each photo (or of all faces with select="all").

    `images`: photos of any sizes, in any form `check_image` takes. `select` and `index`: see `select_faces`.
    `recognizer` maps crops (F, 3, 112, 112), RGB in [-1, 1], float32, to the embedding (F, 512) and four stages;
    `recognizer_digest` is the digest of its weights. Without `recognizer` the package's own recogniser computes the
    embedding, and there are no stages. `on_missing="skip"` skips photos without the requested face. With select="all", a
    face that cannot be cut out is skipped if the photo has another one. `origins`: the files behind the photos, for messages.

    `progress` is called after each photo; `check` is called before each detection attempt and each recogniser call and may
    raise to stop the work.

    The features are float32 on the CPU. Raises NoFaceFoundError or FaceError naming the photo, InputError for
    photos that are not images, NoFaceFoundError if every photo was skipped.
    """
    _require_valid(images, select, on_missing)
    if recognizer is None:
        analyzer.require_recognition()

    outcomes: list[_Outcome] = []
    for position, given in enumerate(images):
        image = check_image(given, position, len(images))
        photo = _Photo(image, position, len(images), origins[position] if origins else None)
        outcomes.append(_find_faces(photo, analyzer, select, index, on_missing, check))
        progress()

    report = "\n".join(line for outcome in outcomes for line in outcome.report.lines())
    crops = [crop for outcome in outcomes for crop in outcome.crops]
    if not crops:
        raise NoFaceFoundError(f"no photo shows a usable face.\n{report}")
    crop_tensor = crops_to_tensor(crops)
    if recognizer is None:
        embedding, stages = _embed(analyzer, crops, check), tuple[Tensor, ...]()
        recognizer_digest = analyzer.recognizer_digest
    else:
        embedding, stages = _recognize(recognizer, crop_tensor, check)
    _require_finite(embedding)
    features = FaceFeatures(
        embedding=embedding,
        stages=stages,
        faces=tuple(face for outcome in outcomes for face in outcome.chosen),
        recognizer=recognizer_digest,
        crops=crop_tensor,
    )
    remarks = tuple(remark for outcome in outcomes for remark in outcome.report.remarks())
    found = tuple(outcome.found for outcome in outcomes)
    chosen = tuple(outcome.chosen for outcome in outcomes)
    return Extraction(features, report, remarks, found, chosen)


def crops_to_tensor(crops: Sequence[Image]) -> Tensor:
    """Convert aligned crops (112, 112, 3), RGB uint8, to the recogniser's input (F, 3, 112, 112), float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).contiguous()


def _require_valid(images: Sequence[Image | Tensor], select: str, on_missing: str) -> None:
    if on_missing not in ON_MISSING:
        raise InputError(f"on_missing must be one of {', '.join(ON_MISSING)}, got {on_missing!r}")
    if not images:
        raise InputError("no images were given; connect at least one photo of the person")
    order_faces([], select)  # raises for an unknown policy


@dataclass(frozen=True, eq=False)
class _Photo:
    """One of the `count` given photos; `position` counts from 0."""

    image: Image
    position: int
    count: int
    origin: Origin | None

    @property
    def name(self) -> str:
        return image_name(self.image, self.position, self.count, self.origin)

    @property
    def scale(self) -> float:
        """Pixels of the photo per pixel of the user's file."""
        return 1.0 if self.origin is None else self.origin.scale_to(self.image)


@dataclass(frozen=True, eq=False)
class _Outcome:
    """The faces of one photo, and its report; a skipped photo has no chosen faces."""

    report: _PhotoReport
    found: tuple[Face, ...]  # in the order used by `index`
    chosen: tuple[Face, ...] = ()
    crops: tuple[Image, ...] = ()


def _find_faces(
    photo: _Photo,
    analyzer: FaceAnalyzer,
    select: str,
    index: int,
    on_missing: str,
    check: Callable[[], None],
) -> _Outcome:
    """Find, select and cut out the faces of one photo. Raises the errors of `extract_features`."""
    search = analyzer.search(photo.image, photo.position, check)
    faces = order_faces(search.faces, select)
    try:
        picked, crops, left_out = _pick(photo.image, search, faces, select, index, photo.scale)
    except FaceError as error:
        reason = f"{error}{'' if faces else _crop_hint(photo)}"
        if on_missing == "error":
            hint = "; or set on_missing to skip, to leave this photo out" if photo.count > 1 else ""
            raise type(error)(f"{photo.name}: {reason}{hint}") from error
        return _Outcome(_PhotoReport(photo.name, skipped=reason), tuple(faces))
    report = _describe(photo.name, search.step, faces, picked, left_out, photo.scale)
    return _Outcome(report, tuple(faces), tuple(picked), tuple(crops))


def _pick(
    image: Image, search: Search, faces: Sequence[Face], select: str, index: int, scale: float
) -> tuple[list[Face], list[Image], list[str]]:
    """Return the selected faces that can be cut out, their crops, and the reasons for the others (only with select="all")."""
    if not faces:
        raise NoFaceFoundError(_not_found(image, search, scale))
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


def _not_found(image: Image, search: Search, scale: float) -> str:
    """Explain that no face was found. `scale`: pixels of the photo per pixel of the user's file."""
    height, width = image.shape[:2]
    if search.too_small:
        return (
            f"the face in it is too small, about {search.too_small / scale:.0f} px high; {SMALL_BOX} px and more make a good identity. Use "
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
        if start == 0:  # allocate once: concatenating parts at the end would need twice the memory
            embedding, *others = (torch.empty(len(crops), *t.shape[1:]) for t in (part, *maps))
            stages = tuple(others)
        for whole, piece in zip((embedding, *stages), (part, *maps), strict=True):
            whole[start : start + _CHUNK] = piece
    return embedding, stages


def _require_finite(embedding: Tensor) -> None:
    if not torch.isfinite(embedding).all():
        raise RecognizerError(
            "the face recogniser gave values that are not finite; run it in float32, or get its file again"
        )


def _crop_hint(photo: _Photo) -> str:
    """Explain how batching may have cropped a photo without a face: certainly, possibly, or not at all (empty)."""
    origin = photo.origin
    if photo.count == 1 or photo.position == 0 or (origin is not None and not origin.is_cropped(photo.image)):
        return ""
    has_been = "may have been" if origin is None else "was"
    return (
        f". It {has_been} cropped to the shape of the first photo when they were joined: crop or pad the photos to one shape "
        "before that"
    )


@dataclass(frozen=True)
class _PhotoReport:
    """Report on one photo."""

    name: str
    head: str = ""
    faces: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: str = ""  # reason for skipping the photo

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        if self.skipped:
            return [f"{self.name}: skipped, {self.skipped}"]
        warnings = [f"  warning: {warning}" for warning in self.warnings]
        return [f"{self.name}: {self.head}", *warnings, *(f"  {face}" for face in self.faces)]

    def remarks(self) -> list[Remark]:
        if self.skipped:
            return [Remark(f"{self.name}: left out, {self.skipped}.", is_warning=True)]
        warnings = [Remark(f"{self.name}: {warning}.", is_warning=True) for warning in self.warnings]
        return [Remark(f"{self.name}: {self.head}; {'; '.join(self.faces)}."), *warnings]


def _describe(
    name: str, step: str, faces: Sequence[Face], picked: Sequence[Face], left_out: Sequence[str], scale: float
) -> _PhotoReport:
    """`scale`: pixels of the photo per pixel of the user's file."""
    noun = "1 face" if len(faces) == 1 else f"{len(faces)} faces"
    warnings = list(left_out)
    if len(faces) > len(picked) + len(left_out):
        used, last = faces.index(picked[0]), len(faces) - 1
        warnings.append(
            f"several faces; used index {used} of 0 to {last}. If that is another person, change select or index"
        )
    for face in picked:
        if min(face.width, face.height) < SMALL_BOX or face.eye_distance < SMALL_EYE_DISTANCE:
            warnings.append(
                f"small face ({face.width / scale:.0f}x{face.height / scale:.0f} px, eyes {face.eye_distance / scale:.0f} px apart); "
                "the identity will be weak"
            )
    for warning in warnings:
        log.warning("%s: %s", name, warning)
    lines = tuple(_describe_face(faces.index(face), face, scale) for face in picked)
    return _PhotoReport(name, f"{noun} found {step}", lines, tuple(warnings))


def _describe_face(index: int, face: Face, scale: float) -> str:
    person = "".join(f", {fact}" for fact in (face.sex, face.age) if fact is not None)
    in_file = ""
    if scale != 1:
        in_file = f" ({face.width / scale:.0f}x{face.height / scale:.0f} px in the file)"
    return (
        f"face {index}: {face.width:.0f}x{face.height:.0f} px{in_file} at ({face.box[0]:.0f}, {face.box[1]:.0f}), "
        f"score {face.score:.2f}{person}"
    )
