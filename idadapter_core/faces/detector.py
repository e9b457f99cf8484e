"""Face detection with insightface (2.x and 0.7.3). Only this file imports it and onnxruntime, on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FaceError, FacePackageError, InputError
from ..files import file_digest
from ..types import Face
from .images import Image, to_bgr_uint8
from .packages import DETECTION, GENDER_AGE, RECOGNITION, WANTED_FILES, Package, read_package
from .windows import DetectedFace, bordered, is_cut, likeness, tile_starts

log = logging.getLogger(__name__)

# The detector misses a face that fills the photo at 640 but finds it at a smaller size; a small face needs the large size.
DETECTION_SIZES = (640, 512, 448, 384, 320, 256, 192, 128)
# Last resort for a close-up cut by the photo's edge: a border of this fraction on each side.
PADDINGS = (0.25, 0.5)
PADDED_SIZES = (640, 320)
DETECTION_THRESHOLD = 0.5
# After that, small faces in large photos: detector sizes that keep more of the photo's pixels, then the photo in tiles.
LARGE_SIZES = (1024, 1280)
_TILE = 1024  # minimum side in pixels
_TILES_ACROSS = 4  # maximum tiles along the longer side, without overlap; larger tiles are downscaled
# Stricter than for a whole photo, because each tile adds a chance of a false detection.
TILE_THRESHOLD = 0.6
_SAME_FACE = 0.4  # intersection over union of two boxes

POLICIES = ("largest", "central", "left to right", "by score", "all")

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}

_INSTALL_HINT = (
    "With ComfyUI's Python run\n"
    "    python -m pip uninstall -y onnxruntime onnxruntime-gpu\n"
    "    python -m pip install insightface onnxruntime\n"
    "(for an NVIDIA GPU the second line is: python -m pip install --no-deps insightface onnxruntime-gpu) and restart."
)


class _Libraries(NamedTuple):
    onnxruntime: Any
    get_model: Any
    Face: Any


class _Attempt(NamedTuple):
    kind: str  # name of all attempts of this kind: "at 640 to 128 px"
    step: str  # name of this attempt: "at 512 px"
    size: int  # of the detector's input
    faces: list[DetectedFace]  # including unusable ones


@dataclass(frozen=True)
class Search:
    """The result of searching one photo for faces."""

    faces: tuple[Face, ...]  # usable, best score first
    step: str  # successful attempt, "at 640 px in tiles of 1024 px"; without faces, all attempts
    too_small: float = 0.0  # height in pixels of the largest face that is too small, if no other was found


class FaceAnalyzer:
    """The opened models of one package, created by `open_analyzer`."""

    def __init__(
        self, package: Package, libraries: _Libraries, providers: Sequence[str], threads: int = 0
    ) -> None:
        self.package = package
        self._libraries = libraries
        self._requested = tuple(providers)
        self._threads = threads
        self._opened: dict[str, Any] = {}
        detector = self._model(DETECTION)
        detector.prepare(0, input_size=(640, 640), det_thresh=DETECTION_THRESHOLD)
        if not detector.use_kps:
            raise FacePackageError(f"{package.models[DETECTION]} finds no landmarks. Choose another package.")
        height, width = detector.input_shape[2:]
        is_fixed = isinstance(height, int) and isinstance(width, int)
        self._sizes = [(width, height)] if is_fixed else [(size, size) for size in DETECTION_SIZES]
        self._padded_sizes = self._sizes if is_fixed else [(size, size) for size in PADDED_SIZES]
        self._large_sizes = [] if is_fixed else [(size, size) for size in LARGE_SIZES]
        if GENDER_AGE in package.models:
            self._model(GENDER_AGE)

    @property
    def provider(self) -> str:
        """The execution provider actually used by the detector's session."""
        return str(self._model(DETECTION).session.get_providers()[0])

    @cached_property
    def recognizer_digest(self) -> str:
        """Id of the package's recogniser in features and adapters."""
        return file_digest(self._path(RECOGNITION))

    def detect(
        self, image: Image, image_index: int = 0, check: Callable[[], None] = lambda: None
    ) -> list[Face]:
        """Return all usable faces of a photo (H, W, 3), RGB uint8, best score first; empty if there are none. See `search`."""
        return list(self.search(image, image_index, check).faces)

    def search(self, image: Image, image_index: int = 0, check: Callable[[], None] = lambda: None) -> Search:
        """Search a photo (H, W, 3), RGB uint8, for usable faces.

        The detector runs at several sizes, 640 px first and then smaller, then with a border around the photo; a photo larger
        than that is then tried at larger sizes and finally in tiles. The first attempt with a usable face wins. `check` is
        called before each attempt and may raise to stop the search.
        """
        bgr = to_bgr_uint8(image)
        tried: list[str] = []
        too_small = 0.0
        for attempt in self._attempts(bgr, check):
            usable = [face for face in attempt.faces if face.is_usable]
            if usable:
                faces = [self._face(bgr, raw, image_index, attempt.size) for raw in usable]
                return Search(tuple(faces), attempt.step)
            tried.append(attempt.kind)
            too_small = max([too_small, *(face.height for face in attempt.faces if face.is_tiny)])
        return Search((), ", ".join(dict.fromkeys(tried)), too_small)

    def embed(self, crop: Image) -> NDArray[np.float32]:
        """Compute the package recogniser's embedding (512,), not normalised, of an aligned crop (112, 112, 3), RGB uint8."""
        embedding = self._model(RECOGNITION).get_feat(to_bgr_uint8(crop))
        return np.asarray(embedding, dtype=np.float32).reshape(-1)

    def require_recognition(self) -> None:
        """Open the package's recogniser now. Raises FacePackageError if the package has none."""
        self._model(RECOGNITION)

    def _path(self, task: str) -> Path:
        if task not in self.package.models:
            has = ", ".join(f"{path.name} ({task})" for task, path in self.package.models.items())
            raise FacePackageError(
                f"the face package {self.package.folder} has no {task} model; it has {has}. "
                f"A complete package holds {WANTED_FILES}. Choose another package."
            )
        return self.package.models[task]

    def _model(self, task: str) -> Any:
        if task not in self._opened:
            path = self._path(task)
            self._opened[task] = _open_model(
                self._libraries, self.package, task, path, self._requested, self._threads
            )
        return self._opened[task]

    def _attempts(self, bgr: NDArray[np.uint8], check: Callable[[], None]) -> Iterator[_Attempt]:
        """Run and yield the attempts one by one, with faces in the photo's coordinates."""
        sizes = f"at {_range(self._sizes)}"
        for size in self._sizes:
            check()
            yield _Attempt(sizes, f"at {max(size)} px", max(size), self._detect_at(bgr, size))
        for share in PADDINGS:
            padded, scale, (x, y) = bordered(bgr, share)
            for size in self._padded_sizes:
                check()
                seen = self._detect_at(padded, size)
                found = [face.moved((-x, -y), 1 / scale) for face in seen if face.is_usable]
                yield _Attempt(
                    "with a border around it", f"at {max(size)} px with a border", max(size), found
                )
        longest = max(bgr.shape[:2])
        above = [max(size) for size in self._sizes][0]
        for size in self._large_sizes:
            if longest > above:
                check()
                found = self._detect_at(bgr, size)
                yield _Attempt(f"at {_range(self._large_sizes)}", f"at {max(size)} px", max(size), found)
                above = max(size)
        if longest > max(above, _TILE):
            side = max(_TILE, -(-longest // _TILES_ACROSS))
            size = self._sizes[0]
            found = self._detect_in_tiles(bgr, side, size, check)
            yield _Attempt("in tiles", f"at {max(size)} px in tiles of {side} px", max(size), found)

    def _detect_in_tiles(
        self, bgr: NDArray[np.uint8], side: int, size: tuple[int, int], check: Callable[[], None]
    ) -> list[DetectedFace]:
        """Return the faces that lie entirely in a tile and are confirmed by `_is_confirmed`, best score first, without duplicates."""
        height, width = bgr.shape[:2]
        candidates: list[DetectedFace] = []
        for top in tile_starts(height, side):
            for left in tile_starts(width, side):
                check()
                tile = np.ascontiguousarray(bgr[top : top + side, left : left + side])
                for face in self._detect_at(tile, size):
                    moved = face.moved((left, top), 1.0)
                    if face.score >= TILE_THRESHOLD and not is_cut(moved, (left, top, side), (width, height)):
                        candidates.append(moved)
        kept: list[DetectedFace] = []
        for face in sorted(candidates, key=lambda face: -face.score):
            if all(likeness(face, other) < _SAME_FACE for other in kept):
                check()
                if self._is_confirmed(bgr, face, size):
                    kept.append(face)
        return kept

    def _is_confirmed(self, bgr: NDArray[np.uint8], face: DetectedFace, size: tuple[int, int]) -> bool:
        """Return whether the detector also finds the face in a crop around it, at another scale."""
        x1, y1, x2, y2 = face.box
        reach = 2 * max(x2 - x1, y2 - y1)
        left, top = (max(round(float(c - reach)), 0) for c in ((x1 + x2) / 2, (y1 + y2) / 2))
        right, bottom = (round(float(c + reach)) + 1 for c in ((x1 + x2) / 2, (y1 + y2) / 2))
        part = np.ascontiguousarray(bgr[top:bottom, left:right])
        return any(
            other.score >= TILE_THRESHOLD and likeness(face, other.moved((left, top), 1.0)) >= _SAME_FACE
            for at in ((size[0] // 2, size[1] // 2), size)
            for other in self._detect_at(part, at if len(self._sizes) > 1 else size)
        )

    def _detect_at(self, bgr: NDArray[np.uint8], size: tuple[int, int]) -> list[DetectedFace]:
        height, width = bgr.shape[:2]
        if min(size[0] * height // width, size[1] * width // height) < 1:
            return []  # a very long photo would be resized to 0 pixels
        boxes, landmarks = self._model(DETECTION).detect(bgr, input_size=size, max_num=0, metric="default")
        return [
            DetectedFace(row[:4], points, float(row[4])) for row, points in zip(boxes, landmarks, strict=True)
        ]

    def _face(self, bgr: NDArray[np.uint8], raw: DetectedFace, image_index: int, size: int) -> Face:
        # insightface's face objects cannot be copied and return None for any attribute, so they stay inside this function.
        face = self._libraries.Face(
            bbox=raw.box.astype(np.float32), kps=raw.landmarks.astype(np.float32), det_score=raw.score
        )
        if GENDER_AGE in self.package.models:
            self._model(GENDER_AGE).get(bgr, face)
        x1, y1, x2, y2 = (float(value) for value in raw.box)
        return Face(
            box=(x1, y1, x2, y2),
            landmarks=tuple((float(x), float(y)) for x, y in raw.landmarks),
            score=raw.score,
            image_index=image_index,
            image_size=(bgr.shape[1], bgr.shape[0]),
            detection_size=size,
            sex=face.sex,
            age=None if face.age is None else int(face.age),
        )


def open_analyzer(
    folder: Path, provider: str = "auto", recognition: bool = False, threads: int = 0
) -> FaceAnalyzer:
    """Open the detector of a package folder, its sex and age model if there is one, and on request its recogniser.

    `provider` is "auto" (CUDA if torch and onnxruntime both have it, else the CPU) or a key of `PROVIDERS`. `threads` is the
    number of CPU threads per model, 0 for the runtime's default. Nothing is downloaded. The provider actually used by the
    detector is logged.

    Raises FacePackageError if insightface, its runtime, the provider or a model is missing or unusable.
    """
    libraries = _import_libraries()
    providers = choose_providers(provider, libraries.onnxruntime.get_available_providers())
    analyzer = FaceAnalyzer(read_package(Path(folder).absolute()), libraries, providers, threads)
    if recognition:
        analyzer.require_recognition()
    log.info("face models run on %s", _short(analyzer.provider))
    if analyzer.provider != providers[0]:
        log.warning("onnxruntime could not start %s for the face models", _short(providers[0]))
    return analyzer


def started_providers(model: Path) -> dict[str, bool]:
    """Open a session of a model with each provider of the installed onnxruntime. Returns whether it really starts, by the keys of `PROVIDERS`.

    A runtime lists the providers that it was built with, on a machine without such a device too.

    Raises FacePackageError if insightface or its runtime is missing or unusable.
    """
    runtime = _import_libraries().onnxruntime
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    found: dict[str, bool] = {}
    for name, provider in PROVIDERS.items():
        if provider in runtime.get_available_providers():
            try:
                session = runtime.InferenceSession(str(model), options, providers=[provider])
                found[name] = session.get_providers()[0] == provider
            except Exception:  # onnxruntime's errors have no other common base class
                found[name] = False
    return found


def choose_providers(provider: str, available: Sequence[str]) -> list[str]:
    """Return onnxruntime's provider names for a choice, with the CPU last as fallback.

    `available` lists the providers that onnxruntime was built with. That does not prove a GPU exists, so "auto" also checks torch.
    """
    cpu = PROVIDERS["cpu"]
    if provider == "auto":
        cuda = PROVIDERS["cuda"]
        return [cuda, cpu] if cuda in available and torch.cuda.is_available() else [cpu]
    if provider not in PROVIDERS:
        raise InputError(f"provider must be auto or one of {', '.join(PROVIDERS)}, got {provider!r}")
    chosen = PROVIDERS[provider]
    if chosen not in available:
        usable = ", ".join(name for name, full in PROVIDERS.items() if full in available)
        raise FacePackageError(
            f"the installed onnxruntime has no provider '{provider}'; it has {usable}. Choose auto, or install the "
            "onnxruntime flavour that brings it (only one flavour may be installed at a time)."
        )
    return [chosen] if chosen == cpu else [chosen, cpu]


def order_faces(faces: Sequence[Face], policy: str) -> list[Face]:
    """Sort the faces of one photo in the order used by `index`. Ties are broken from left to right, then top to bottom.

    largest: by box area; central: by distance to the photo's centre; left to right and all: by the box's centre;
    by score: highest detector confidence first.
    """
    if policy not in POLICIES:
        raise InputError(f"select must be one of {', '.join(POLICIES)}, got {policy!r}")
    return sorted(faces, key=lambda face: _order_key(face, policy))


def select_faces(faces: Sequence[Face], policy: str = "largest", index: int = 0) -> list[Face]:
    """Return the face at `index` (from 0) in the order of the policy; with "all", every face, without an index.

    Raises FaceError if there are fewer faces.
    """
    ordered = order_faces(faces, policy)
    if policy == "all":
        return ordered
    if index < 0:
        raise InputError(f"index must be 0 (the first face) or more, got {index}")
    if index >= len(ordered):
        raise FaceError(
            f"asked for face {index + 1} (index {index}, {policy}), found {len(ordered)}; "
            f"lower the index{'' if ordered else ' or use a photo with a face'}"
        )
    return [ordered[index]]


def _order_key(face: Face, policy: str) -> tuple[float, float, float]:
    (x, y), (width, height) = face.center, face.image_size
    if policy == "largest":
        return -face.area, x, y
    if policy == "central":
        return (x - width / 2) ** 2 + (y - height / 2) ** 2, x, y
    if policy == "by score":
        return -face.score, x, y
    return x, x, y


def _import_libraries() -> _Libraries:
    try:
        import onnxruntime
        from insightface.app.common import Face as InsightFace
        from insightface.model_zoo import get_model

        # Uninstalling one of two onnxruntime flavours leaves an empty package that can still be imported.
        onnxruntime.InferenceSession  # noqa: B018
    except (ImportError, AttributeError, ValueError, OSError) as error:  # another numpy, a missing library
        raise FacePackageError(
            f"face analysis needs insightface and onnxruntime, and they cannot be used: {error}.\n{_INSTALL_HINT}"
        ) from error
    return _Libraries(onnxruntime, get_model, InsightFace)


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _open_model(
    libraries: _Libraries, package: Package, task: str, path: Path, providers: Sequence[str], threads: int
) -> Any:
    options = libraries.onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Without this, spinning worker threads of several sessions starve each other and torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: published models cause pages of harmless warnings
    manifest = {"model_task": task} if package.has_manifest else {}
    try:
        model = libraries.get_model(
            str(package.folder if package.has_manifest else path),
            providers=list(providers),
            sess_options=options,
            static_shape_sessions=False,  # one session for all sizes instead of one copy of the model for each
            **manifest,
        )
    except Exception as error:  # onnxruntime's errors have no other common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise FacePackageError(
            f"{path} cannot be opened as a {task} model: {reason}. Delete it and get the package again."
        ) from error
    if model is None or model.taskname != task:
        raise FacePackageError(
            f"insightface does not accept {path} as a {task} model. A package with a manifest needs insightface 2; "
            "otherwise choose another package."
        )
    return model


def _range(sizes: Sequence[tuple[int, int]]) -> str:
    """ "640 to 128 px"."""
    first, last = max(sizes[0]), max(sizes[-1])
    return f"{first} px" if first == last else f"{first} to {last} px"
