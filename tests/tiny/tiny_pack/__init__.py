"""A custom node pack, for tests only, that lets ComfyUI recognise the tiny checkpoints and CLIP vision models.

Linked into the `custom_nodes` folder of a test server, it makes the stock `CheckpointLoaderSimple`
load the files of `tests/tiny/checkpoints.py`, and the stock `CLIPVisionLoader` those of `tests/tiny/vision.py`, through the
same code as real ones. Its two nodes make broken images and masks.
"""

from __future__ import annotations

from typing import Any

from .models import TinySD15, TinySD21, TinySDXL, register
from .spoil import SpoilImage, SpoilMask

__all__ = ["NODE_CLASS_MAPPINGS", "TinySD15", "TinySD21", "TinySDXL", "register"]

NODE_CLASS_MAPPINGS: dict[str, Any] = {"TinySpoilImage": SpoilImage, "TinySpoilMask": SpoilMask}

register()
