"""Finds the files behind a batch of photos in the running prompt, so that messages can name the user's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import folder_paths
from comfy_execution.graph import NodeNotFoundError
from PIL import Image, ImageSequence

from ...idadapter_core.faces.images import Origin

_TURNED = range(5, 9)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_DEEPEST = 50  # maximum nodes between a loader and its user; also stops at circular wiring


_NodeOf = Callable[[str], Mapping[str, Any]]  # id of a node -> {class_type, inputs}


def photo_origins(node: Any, names: Iterable[str], count: int) -> list[Origin | None]:
    """Return the file of each photo wired to the inputs `names` of a node.

    Links are followed to Load Image through nodes that join batches and through Enrich Photos, whose variants have no file (None).
    The result is empty if there is any other node on the way or if the files do not hold `count` photos: only certain origins
    are reported.

    Args:
        node: holder of the node's hidden inputs, with `dynprompt` and `unique_id`; None outside a prompt.
    """
    if node is None:
        return []
    try:
        node_of: _NodeOf = node.dynprompt.get_node
        inputs = node_of(node.unique_id)["inputs"]
        found = [
            origin for name in names if name in inputs for origin in _trace(node_of, inputs[name], _DEEPEST)
        ]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OSError, NodeNotFoundError):
        return []
    return found if len(found) == count else []


def _trace(node_of: _NodeOf, link: Any, depth: int) -> list[Origin | None]:
    """Return the origins behind a link. Raises ValueError if one is unknown."""
    node = node_of(link[0])
    if depth and node["class_type"] == "LoadImage":
        return _read(node["inputs"]["image"])
    if depth and node["class_type"] in ("ImageBatch", "BatchImagesNode"):
        inputs = sorted(node["inputs"].items(), key=lambda entry: _number(entry[0]))
        return [origin for _, value in inputs for origin in _trace(node_of, value, depth - 1)]
    if depth and node["class_type"] == "IDAdapterEnrich":
        given = _trace(node_of, node["inputs"]["image"], depth - 1)
        return [*given, *[None] * (int(node["inputs"]["count"]) - len(given))]
    raise ValueError(f"{node['class_type']} may change photos")


def _number(name: str) -> int:
    """Return the number at the end of an input's name: image2, images.image10. Raises ValueError if there is none."""
    return int(name[len(name.rstrip("0123456789")) :])


def _read(name: str) -> list[Origin | None]:
    """Return one origin per frame. Only the header of the file is read, unless it is animated."""
    with Image.open(folder_paths.get_annotated_filepath(name)) as picture:
        width, height = picture.size
        if picture.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
        frames = (
            sum(1 for _ in ImageSequence.Iterator(picture)) if getattr(picture, "is_animated", False) else 1
        )
    return [Origin(name, width, height)] * frames
