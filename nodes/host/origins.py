"""The files behind a batch of photos, read from the prompt that runs: so that messages speak of the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import folder_paths
from PIL import Image, ImageSequence

from ...idadapter_core.faces.images import Origin

_TURNED = range(5, 9)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_DEEPEST = 50  # nodes between a loader and its user; also the end of a prompt that is wired in a circle


def photo_origins(node: Any, name: str, count: int) -> list[Origin | None]:
    """The file of each photo that is wired to the input `name` of a node; `node` is its holder of hidden inputs, `prompt` and
    `unique_id` among them, or None outside a prompt.

    Followed are links through nodes that join batches, to Load Image. Empty where any other node is on the way, or where the
    files hold another number of photos than `count`: what is not certain is not said.
    """
    if node is None:
        return []
    try:
        found = _behind(node.prompt, node.prompt[node.unique_id]["inputs"][name], _DEEPEST)
    except (KeyError, TypeError, ValueError, IndexError, OSError):
        return []
    return found if len(found) == count else []


def _behind(prompt: Mapping[str, Any], link: Any, depth: int) -> list[Origin | None]:
    """Raises ValueError where the origin is not known."""
    node = prompt[link[0]]
    if depth and node["class_type"] == "LoadImage":
        return _read(node["inputs"]["image"])
    if depth and node["class_type"] in ("ImageBatch", "BatchImagesNode"):
        inputs = sorted(node["inputs"].items(), key=lambda entry: _number(entry[0]))
        return [origin for _, value in inputs for origin in _behind(prompt, value, depth - 1)]
    raise ValueError(f"{node['class_type']} may change photos")


def _number(name: str) -> int:
    """The number at the end of an input's name: image2, images.image10. Raises ValueError where there is none."""
    return int(name[len(name.rstrip("0123456789")) :])


def _read(name: str) -> list[Origin | None]:
    """One origin for each frame; only the file's head is read, unless it is animated."""
    with Image.open(folder_paths.get_annotated_filepath(name)) as picture:
        width, height = picture.size
        if picture.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
        frames = (
            sum(1 for _ in ImageSequence.Iterator(picture)) if getattr(picture, "is_animated", False) else 1
        )
    return [Origin(name, width, height)] * frames
