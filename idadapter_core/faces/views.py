"""Views of faces for CLIP vision. A method that needs another view adds it here and names it in its `needs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..types import HEAD, Face
from .align import align_face, square_crop
from .images import Image


@dataclass(frozen=True)
class View:
    """One view: a name and a crop function."""

    name: str
    cut: Callable[[Image, Face], Image] | None
    """(photo (H, W, 3), face) -> picture (S, S, 3), both RGB uint8; None: pixel values of exactly 0 instead of a picture."""


VIEWS = {
    view.name: view
    for view in (
        View(HEAD, square_crop),
        View("aligned_224", lambda image, face: align_face(image, face.landmarks, 224)),
        View("blank", None),
    )
}
