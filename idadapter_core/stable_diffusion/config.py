"""Which base model, and which frozen networks beside it: paths on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import existing, one_of

FAMILIES = ("sd15", "sd21", "sdxl")
PREDICTIONS = ("auto", "epsilon", "v_prediction")
PRECISIONS = ("no", "bf16")
_PATHS = ("path", "config", "tokenizer", "vae", "vision", "recognizer", "face_package")


@dataclass(frozen=True)
class BaseConfig:
    """The frozen models around the adapter. Paths on disk; nothing is fetched."""

    path: str = ""  # Stable Diffusion: a diffusers folder or a single-file checkpoint
    family: str = "sd15"  # sd15, sd21 or sdxl
    prediction: str = "auto"  # what the UNet predicts; auto: as the folder's scheduler says, or as ComfyUI tells it from a file
    config: str = (
        ""  # for a single file of other sizes than published: a folder with diffusers configurations
    )
    tokenizer: str = ""  # for a single file: a folder with CLIP's vocab.json and merges.txt
    vae: str = ""  # another VAE; empty: the base's own
    vision: str = ""  # CLIP vision for IDAdapter: a folder of transformers, or a file of weights
    recognizer: str = ""  # face network: a torch IResNet (.pth, .safetensors, .onnx)
    face_package: str = ""  # folder of an insightface package; only for a detector in L_id

    def __post_init__(self) -> None:
        one_of("base.family", self.family, FAMILIES)
        one_of("base.prediction", self.prediction, PREDICTIONS)


def require_paths(base: BaseConfig, without: Sequence[str], others: Mapping[str, str]) -> None:
    """See that all files and folders are there before the first of them is read. What is empty is not looked at.

    Args:
        without: paths of `base` that are not needed.
        others: further settings and what they name.

    Raises:
        ConfigError: one of them is not there.
    """
    of_base = {f"base.{name}": getattr(base, name) for name in _PATHS if name not in without}
    for name, value in {**of_base, **others}.items():
        if value:
            existing(name, value)
