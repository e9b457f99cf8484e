"""Divides a picture among the people in it: a mask around each face, without overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FaceError, InputError
from ..types import Face
from .detector import order_faces

MAX_GROW = 10.0


def choose_people(faces: Sequence[Face], count: int) -> list[Face]:
    """Return the `count` largest faces of a picture, from left to right.

    Raises:
        FaceError: there are fewer.
    """
    if count < 1:
        raise InputError(f"people must be 1 or more, got {count}")
    if len(faces) < count:
        found = (
            "no face was" if not faces else f"only {len(faces)} face{'s were' if len(faces) > 1 else ' was'}"
        )
        raise FaceError(
            f"{count} people are wanted, and {found} found; lower `people`, or use a picture that shows all faces"
        )
    return order_faces(order_faces(faces, "largest")[:count], "left to right")


def people_masks(faces: Sequence[Face], height: int, width: int, grow: float) -> Tensor:
    """Draw a mask for each face: 1 in its box enlarged, 0 elsewhere. Where boxes overlap, each pixel belongs to the nearest of
    their faces.

    Distances are measured in sizes of the faces, so a large face in front keeps its surroundings.

    Args:
        grow: how far a mask reaches beyond the face's box on each side, in sizes of the box; downwards twice as far, for the body.

    Returns:
        (F, height, width), float32.
    """
    if not 0 <= grow <= MAX_GROW:
        raise InputError(f"grow must be between 0 and {MAX_GROW:g}, got {grow}")
    y = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float32)[None] + 0.5
    inside, distances = [], []
    for face in faces:
        x1, y1, x2, y2 = face.box
        side, (cx, cy) = max(face.width, face.height), face.center
        across = (x >= x1 - grow * side) & (x <= x2 + grow * side)
        along = (y >= y1 - grow * side) & (y <= y2 + 2 * grow * side)
        inside.append(across & along)
        distances.append(torch.hypot(x - cx, y - cy) / max(side, 1.0))
    reached = torch.stack(inside)
    nearest = torch.stack(distances).masked_fill(~reached, float("inf")).argmin(0)
    own = torch.arange(len(faces))[:, None, None] == nearest
    return (reached & own).float()
