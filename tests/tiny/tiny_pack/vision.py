"""The tiny CLIP vision models: ComfyUI's own class with the sizes of the JSON files beside this one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.clip_vision

# Every CLIP vision model has this one, (hidden_size,); SigLIP, which has none, and DINO are not imitated here.
_CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"


def register() -> None:
    """Let ComfyUI's detection of CLIP vision files recognise the tiny ones. Doing it twice is harmless."""
    # Both `comfy.clip_vision.load` and the checkpoint loader look the function up in its module at each call.
    stock = comfy.clip_vision.load_clipvision_from_sd
    if not hasattr(stock, "recognises_tiny"):
        comfy.clip_vision.load_clipvision_from_sd = _recognising_tiny(stock)


def _recognising_tiny(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load(sd: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = _config_file(sd)
        return stock(sd, *args, **kwargs) if config is None else _load(config, sd)

    vars(load)["recognises_tiny"] = True
    return load


def _config_file(sd: dict[str, Any]) -> Path | None:
    """The configuration of the width of these weights; None where there is none, as for every real model."""
    if _CLASS_EMBEDDING not in sd:
        return None
    path = Path(__file__).with_name(f"clip_vision_{len(sd[_CLASS_EMBEDDING])}.json")
    return path if path.is_file() else None


def _load(config: Path, sd: dict[str, Any]) -> comfy.clip_vision.ClipVisionModel:
    # A path, because older ComfyUI takes no dictionary.
    clip_vision = comfy.clip_vision.ClipVisionModel(str(config))
    missing, unexpected = clip_vision.load_sd(sd)
    if missing or unexpected:
        raise ValueError(f"not a CLIP vision model of {config.name}: {missing=}, {unexpected=}")
    return clip_vision
