"""The frozen networks that read photos: face recogniser, CLIP vision, face detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..faces.detector import FaceAnalyzer, open_analyzer
from ..faces.images import Image
from ..faces.iresnet import IResNet, load_iresnet
from ..faces.views import View
from ..methods.method import Needs
from ..recognizer import recorded_recognizer
from ..types import Face, ViewKey
from .config import BaseConfig
from .vision import VisionEncoder, load_vision


@dataclass(frozen=True, eq=False)
class Networks:
    """The frozen networks besides the base model."""

    recognizer: IResNet
    vision: VisionEncoder | None = None  # for methods that use it
    detector: FaceAnalyzer | None = None  # for L_id with a detector


def load_networks(base: BaseConfig, needs: Needs, needs_detector: bool) -> tuple[Networks, str]:
    """Load the networks that read faces. Return them and the recogniser's recorded name.

    Raises:
        ConfigError: the path of a network that the method needs is not set.
    """
    if not base.recognizer:
        raise ConfigError(
            "base.recognizer is empty; name the face network's file (UniID: iResNet-100 of Glint360K; IDAdapter: also the "
            "recogniser .onnx of the face package that its users will have)"
        )
    path = Path(base.recognizer)
    recognizer = load_iresnet(path, any_layers=path.suffix == ".onnx" and not needs.stages)
    vision = None
    if needs.vision is not None:
        if not base.vision:
            raise ConfigError(
                "base.vision is empty; IDAdapter needs a CLIP vision model (ViT-L/14 in the paper)"
            )
        vision = load_vision(Path(base.vision))
    detector: FaceAnalyzer | None = None
    if needs_detector:
        if not base.face_package:
            raise ConfigError(
                "loss.gate or loss.align is 'detector', so base.face_package must name the folder of a face package; or set "
                "them to 'noise' and 'target'"
            )
        detector = open_analyzer(Path(base.face_package), "cpu")
    return Networks(recognizer, vision, detector), recorded_recognizer(path, needs.stages, recognizer)


@torch.no_grad()
def encode_heads(vision: VisionEncoder, heads: Tensor) -> dict[str, Tensor]:
    """Compute `patch_tokens` (F, P, d) and `class_embedding` (F, d) of heads (F, 3, S, S)."""
    patches, classes = vision(heads)
    return {"patch_tokens": patches.float(), "class_embedding": classes.float()}


def encode_views(
    vision: VisionEncoder,
    views: Sequence[View],
    photos: Sequence[tuple[Image, Face]],
    device: torch.device | str,
) -> dict[ViewKey, Tensor]:
    """Compute CLIP vision's states of faces, given as (photo, face) pairs, in other views than the head, on the CPU."""
    found: dict[ViewKey, Tensor] = {}
    for view in views:
        if view.cut is None:
            pixels = torch.zeros(1, 3, vision.side, vision.side)
        else:
            pixels = vision.preprocess([view.cut(photo, face) for photo, face in photos])
        found[ViewKey(vision.digest, view.name)] = vision.states(pixels.to(device)).float().cpu()
    return found
