"""Face detector and recogniser under ComfyUI's management, and what they find in photos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...idadapter_core.errors import FaceError
from ...idadapter_core.faces.align import align_face, square_crop
from ...idadapter_core.faces.detector import FaceAnalyzer, open_analyzer
from ...idadapter_core.faces.features import Extraction, crops_to_tensor, extract_features
from ...idadapter_core.faces.images import Image, check_image, crops_to_pixels
from ...idadapter_core.faces.iresnet import digest, load_iresnet
from ...idadapter_core.faces.packages import package_files, resolve_package
from ...idadapter_core.methods import views_read
from ...idadapter_core.types import Face, FaceFeatures
from . import choices, paths
from .images import photos
from .memory import Live, Recent, manage, require_same_file
from .origins import photo_origins
from .vision import digest_of, encode_heads, encode_views


@dataclass(frozen=True, eq=False)
class LoadedAnalyzer:
    """Value of the FACE_ANALYZER socket: the detector, and the torch recogniser under ComfyUI's management."""

    analyzer: FaceAnalyzer
    recognizer: Any = None  # ModelPatcher of an IResNet, or None for the recogniser of the package
    recognizer_digest: str = ""

    @property
    def digest(self) -> str:
        """Id of the recogniser in features."""
        return self.recognizer_digest or self.analyzer.recognizer_digest

    def get_models(self) -> list[Any]:
        """Return the patcher, for ComfyUI's memory accounting of cached node outputs."""
        return [] if self.recognizer is None else [self.recognizer]

    def recognize(self, crops: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute embedding and stages of crops (F, 3, 112, 112) on ComfyUI's compute device."""
        comfy.model_management.load_models_gpu([self.recognizer])
        result: tuple[Tensor, list[Tensor]] = self.recognizer.model(crops.to(self.recognizer.load_device))
        return result

    def features_in(self, picture: Tensor) -> FaceFeatures | None:
        """Describe all faces in a picture (H, W, 3), RGB in 0..1; None if there is none that can be used."""
        pixels = check_image(picture)
        faces: list[Face] = []
        crops: list[Image] = []
        check = comfy.model_management.throw_exception_if_processing_interrupted
        for face in self.analyzer.detect(pixels, check=check):
            with contextlib.suppress(FaceError):  # one at the edge that cannot be cut out
                crops.append(align_face(pixels, face.landmarks))
                faces.append(face)
        if not faces:
            return None
        cut = crops_to_tensor(crops)
        return FaceFeatures(self.embed(cut), faces=tuple(faces), recognizer=self.digest, crops=cut)

    def embed(self, crops: Tensor) -> Tensor:
        """Compute the embeddings (F, 512) of crops (F, 3, 112, 112), RGB in [-1, 1]."""
        if self.recognizer is not None:
            return self.recognize(crops)[0].float().cpu()
        return torch.stack([torch.from_numpy(self.analyzer.embed(crop)) for crop in crops_to_pixels(crops)])


def load_recognizer(
    path: Path, progress: Callable[[], object] = lambda: None, *, any_layers: bool = False
) -> tuple[Any, str]:
    """Load a torch face network. Return its ModelPatcher and digest; `progress` is called after each of the two.

    `any_layers`: accept networks of other sizes than the published ones.
    """
    network = load_iresnet(path, any_layers=any_layers)
    progress()
    name = digest(network)
    progress()
    return manage(network, _reload_recognizer, path, name, any_layers), name


def _reload_recognizer(path: Path, expected: str, any_layers: bool) -> Any:
    patcher, found = load_recognizer(path, any_layers=any_layers)
    require_same_file(path, expected, found)
    return patcher


_live: Live[LoadedAnalyzer] = Live()


def open_files(package: str, recognizer: str, provider: str, *, hand_over: bool = False) -> LoadedAnalyzer:
    """Open a face package and a recogniser by the user's choices, or return what still uses them (see `Live`)."""
    folder = resolve_package(choices.package(package), paths.insightface_roots())
    file = None if recognizer == choices.FROM_PACKAGE else paths.path_of(paths.RECOGNIZERS, recognizer)
    stamp = f"{provider} {paths.stamp(*package_files(folder), file)}"
    return _live.get(stamp, lambda: _open(folder, file, provider), hand_over=hand_over)


def _open(package: Path, recognizer: Path | None, provider: str) -> LoadedAnalyzer:
    if recognizer is None:
        return LoadedAnalyzer(open_analyzer(package, provider, recognition=True))
    progress = comfy.utils.ProgressBar(3)
    patcher, recognizer_digest = load_recognizer(recognizer, lambda: progress.update(1))
    analyzer = open_analyzer(package, provider)
    progress.update(1)
    return LoadedAnalyzer(analyzer, patcher, recognizer_digest)


@dataclass(frozen=True)
class Selection:
    """Which faces of photos count; see the inputs of Extract Face Features."""

    select: str
    index: int
    on_missing: str


_found: Recent[Extraction] = Recent()
_described: Recent[dict[str, Any]] = Recent()


def faces_in(
    given: Mapping[str, Tensor], analyzer: LoadedAnalyzer, selection: Selection, node: Any
) -> tuple[list[Tensor], Extraction]:
    """Return the photos in IMAGEs, by the input that each is wired to, and the faces in them. The last result for the same is kept.

    Args:
        node: holder of the node's hidden inputs, for the names of files; None outside a prompt.
    """
    first, *others = given.values()
    pictures = photos(first, *others)

    def extract() -> Extraction:
        progress = comfy.utils.ProgressBar(len(pictures))
        return extract_features(
            pictures,
            analyzer.analyzer,
            None if analyzer.recognizer is None else analyzer.recognize,
            select=selection.select,
            index=selection.index,
            on_missing=selection.on_missing,
            recognizer_digest=analyzer.recognizer_digest,
            origins=photo_origins(node, given, len(pictures)),
            progress=lambda: progress.update(1),
            check=comfy.model_management.throw_exception_if_processing_interrupted,
        )

    return pictures, _found.get(first, others, selection, extract, analyzer)


def with_heads(features: FaceFeatures, pictures: Sequence[Tensor], clip_vision: Any) -> FaceFeatures:
    """Add what CLIP vision sees of each head. The last result for the same features is kept."""

    def describe() -> dict[str, Any]:
        faces = [(check_image(pictures[face.image_index]), face) for face in features.faces]
        patch_tokens, class_embedding = encode_heads(clip_vision, (square_crop(*pair) for pair in faces))
        return {
            "patch_tokens": patch_tokens,
            "class_embedding": class_embedding,
            "vision": digest_of(clip_vision),
            "views": encode_views(clip_vision, views_read(), faces),
        }

    # The features themselves hold the embedding, by which the result is kept: kept with it, they would never be let go.
    return replace(features, **_described.get(features.embedding, [clip_vision], None, describe))
