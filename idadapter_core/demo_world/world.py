"""The demo world outside ComfyUI: its base model for `stable_diffusion.Pipeline`, its face networks and its adapters, from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, load_adapter
from ..faces.align import square_crop
from ..faces.detector import FaceAnalyzer, open_analyzer
from ..faces.features import extract_features
from ..faces.images import Image
from ..faces.iresnet import IResNet, digest, load_iresnet
from ..mechanisms.text import IDENTIFIER
from ..schedule import RescaleSchedule
from ..stable_diffusion.base import Base
from ..stable_diffusion.networks import encode_heads
from ..stable_diffusion.text import TextEncoders
from ..stable_diffusion.vae import load_autoencoder
from ..stable_diffusion.vision import VisionEncoder, load_vision
from ..types import FaceFeatures
from .base import load_base
from .shipped import (
    ASSETS,
    AUTOENCODER,
    BASE,
    CLIP_VISION,
    PACKAGE,
    RECOGNIZER_FILE,
    adapter_file,
)
from .words import words

FAMILY = "sd15"  # of the form of the base model
SIZE = 128  # pixels along a side of its pictures
STEPS, CFG, SAMPLER = 8, 3.0, "lcm"
"""How its pictures are drawn (decision 0015, item 8)."""
RESCALED = RescaleSchedule(1.8, 1.8, 1.0, 1.0)
"""What the demo world's UniID is rescaled by: of the scales tried, one with much likeness at prompts within 5 points of the base model's
(decision 0015, item 8). The published numbers are for SDXL."""


class RowTokenizer:
    """CLIP's tokenizer for the words of captions, with rows of the small table as token ids. Other words have one common id."""

    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        row = words().rows(text)
        return {"input_ids": row[: row.index(self.eos_token_id) + 1]}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return a name for each id. Only the identity word's must be CLIP's: it ends its word."""
        identifier = self(IDENTIFIER)["input_ids"][1]
        return [f"{IDENTIFIER}</w>" if token == identifier else f"{token}</w>" for token in ids]

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all rows."""
        return {str(row): row for row in range(words().unknown + 1)}


@dataclass(frozen=True, eq=False)
class World:
    """Everything that pictures are made and described with."""

    base: Base
    analyzer: FaceAnalyzer
    recognizer: IResNet
    recognizer_digest: str
    vision: VisionEncoder | None
    files: Path

    def adapter(self, name: str) -> Adapter | None:
        """Load an adapter by the name of its file; None if there is no such file."""
        path = self.files / adapter_file(name)
        return load_adapter(path) if path.is_file() else None

    def features(self, photos: Sequence[Image]) -> FaceFeatures:
        """Describe the largest face of each photo (H, W, 3), as Extract Face Features does.

        Raises:
            NoFaceFoundError: a photo shows no face.
        """
        extraction = extract_features(
            photos, self.analyzer, self.recognizer, recognizer_digest=self.recognizer_digest
        )
        features = extraction.features
        if self.vision is None:
            return features
        heads = [square_crop(photo, face) for photo, face in zip(photos, features.faces, strict=True)]
        with torch.no_grad():
            seen = encode_heads(self.vision, self.vision.preprocess(heads))
        return replace(
            features,
            patch_tokens=seen["patch_tokens"],
            class_embedding=seen["class_embedding"],
            vision=self.vision.digest,
        )


def open_world(files: Path = ASSETS) -> World:
    """Open the demo world from the shipped files, or from those of a build.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    package = files / PACKAGE
    recognizer = load_iresnet(package / RECOGNIZER_FILE, any_layers=True)
    vision = files / CLIP_VISION
    return World(
        open_base(files / BASE, files / AUTOENCODER),
        open_analyzer(package, "cpu"),
        recognizer,
        digest(recognizer),
        load_vision(vision) if vision.is_dir() else None,
        files,
    )


def open_base(base: Path, autoencoder: Path) -> Base:
    """Open the base model for `stable_diffusion.Pipeline`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    model = load_base(base)
    text = TextEncoders(FAMILY, {"l": model.text}, {"l": RowTokenizer()})
    return Base(FAMILY, model.unet, load_autoencoder(autoencoder, FAMILY, {}), text, model.schedule, "")
