"""A custom node pack, for tests only, that lets ComfyUI's checkpoint detection recognise the tiny checkpoints.

Linked into the `custom_nodes` folder of a test server, it makes the stock `CheckpointLoaderSimple`
load the files of `tests/tiny/checkpoints.py` through the same code as a real checkpoint. Its two nodes make broken images
and masks.
"""

from __future__ import annotations

from typing import Any

from .models import TinySD15, TinySD21, TinySDXL, register
from .spoil import SpoilImage, SpoilMask

__all__ = ["NODE_CLASS_MAPPINGS", "TinySD15", "TinySD21", "TinySDXL", "register"]

NODE_CLASS_MAPPINGS: dict[str, Any] = {"TinySpoilImage": SpoilImage, "TinySpoilMask": SpoilMask}

register()
