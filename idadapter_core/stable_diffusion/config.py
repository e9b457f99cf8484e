"""Paths of the base model and of the frozen networks used with it."""

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
    """The frozen models (`[base]`): local paths; nothing is downloaded. A resumed run recognises the models by their digests."""

    path: MayChange[str] = ""  # Stable Diffusion: a diffusers folder or a single-file checkpoint
    family: str = "sd15"  # sd15, sd21 or sdxl
    # epsilon, v_prediction or auto. auto: from the folder's scheduler config; for a single file, detected as ComfyUI does.
    prediction_type: str = "auto"
    # For a single file whose model sizes differ from the published ones: a folder of diffusers configurations.
    config: MayChange[str] = ""
    tokenizer: MayChange[str] = ""  # for a single file: a folder with CLIP's vocab.json and merges.txt
    vae: MayChange[str] = ""  # another VAE; empty: the base model's own
    vision: MayChange[str] = ""  # CLIP vision for IDAdapter: a transformers folder or a weights file
    recognizer: MayChange[str] = ""  # face network: a torch IResNet (.pth, .safetensors, .onnx)
    face_package: MayChange[str] = ""  # folder of an insightface package; only for a detector in L_id
    renamed: ClassVar = {"prediction": "prediction_type"}

    def __post_init__(self) -> None:
        one_of("base.family", self.family, FAMILIES)
        one_of("base.prediction_type", self.prediction_type, PREDICTIONS)


def require_paths(base: BaseConfig, without: Sequence[str], others: Mapping[str, str]) -> None:
    """Check that all files and folders exist, before any of them is read. Empty paths are skipped.

    Args:
        without: paths of `base` that are not needed.
        others: further settings and their paths.

    Raises:
        ConfigError: one of them does not exist.
    """
    of_base = {f"base.{name}": getattr(base, name) for name in _PATHS if name not in without}
    for name, value in {**of_base, **others}.items():
        if value:
            existing(name, value)
