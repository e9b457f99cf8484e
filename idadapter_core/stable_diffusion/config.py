"""Settings of the base model and the other frozen networks: paths on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..config import MayChange, Settings, existing, one_of

FAMILIES = ("sd15", "sd21", "sdxl")
PREDICTIONS = ("auto", "epsilon", "v_prediction")
PRECISIONS = ("no", "bf16")
_PATHS = ("path", "config", "tokenizer", "vae", "vision", "recognizer", "face_package")


@dataclass(frozen=True)
class BaseConfig(Settings):
    """The frozen models around the adapter. Paths on disk; nothing is downloaded. A resumed run checks the models' digests."""

    path: MayChange[str] = ""  # Stable Diffusion: a diffusers folder or a single-file checkpoint
    family: str = "sd15"  # sd15, sd21 or sdxl
    prediction_type: str = "auto"  # epsilon or v_prediction; auto: from the folder's scheduler, or detected in a file as ComfyUI does
    config: MayChange[str] = (
        ""  # for a single file of unpublished sizes: a folder with diffusers configurations
    )
    tokenizer: MayChange[str] = ""  # for a single file: a folder with CLIP's vocab.json and merges.txt
    vae: MayChange[str] = ""  # another VAE; empty: the base's own
    vision: MayChange[str] = ""  # CLIP vision for IDAdapter: a transformers folder, or a weights file
    recognizer: MayChange[str] = ""  # face network: a torch IResNet (.pth, .safetensors, .onnx)
    face_package: MayChange[str] = ""  # folder of an insightface package; only for L_id with a detector
    renamed: ClassVar = {"prediction": "prediction_type"}

    def __post_init__(self) -> None:
        one_of("base.family", self.family, FAMILIES)
        one_of("base.prediction_type", self.prediction_type, PREDICTIONS)


def require_paths(base: BaseConfig, without: Sequence[str], others: Mapping[str, str]) -> None:
    """Check that all files and folders exist before the first of them is read. Empty settings are skipped.

    Args:
        without: paths of `base` that are not needed.
        others: further settings, name -> path.

    Raises:
        ConfigError: one of them does not exist.
    """
    of_base = {f"base.{name}": getattr(base, name) for name in _PATHS if name not in without}
    for name, value in {**of_base, **others}.items():
        if value:
            existing(name, value)
