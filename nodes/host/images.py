"""Conversion between ComfyUI's IMAGE and MASK and the core's photos. Layouts change nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...idadapter_core.errors import InputError
from ...idadapter_core.faces.images import Image, check_image, require_image
from ...idadapter_core.faces.preview import draw_preview, face_mask, preview_size
from ...idadapter_core.types import Face


def photos(image: Tensor) -> list[Tensor]:
    """Split an IMAGE (B, H, W, C) in 0..1 into checked photos. `check_image` converts one to (H, W, 3), RGB uint8.

    Photos are not converted here, because a video would take gigabytes.

    Raises:
        InputError: wrong shape, NaN, or too small; names the photo.
    """
    if image.ndim != 4:
        raise InputError(
            f"expected an IMAGE of shape (batch, height, width, channels), got {tuple(image.shape)}; "
            "repair the node that made it"
        )
    for index, photo in enumerate(image):
        require_image(photo, index, len(image))
    return list(image)


def to_image(pictures: Iterable[Image], count: int) -> Tensor:
    """Convert `count` pictures (H, W, 3), RGB uint8, of one size to IMAGE (count, H, W, 3) in 0..1, one at a time."""
    image = torch.empty(0)
    for number, picture in enumerate(pictures):
        if number == 0:
            image = torch.empty(count, *picture.shape)
        image[number] = torch.from_numpy(picture)
    return image.div_(255)


def previews(
    pictures: Sequence[Tensor], found: Sequence[Sequence[Face]], chosen: Sequence[Sequence[Face]]
) -> tuple[Tensor, Tensor]:
    """Draw photos with boxes around their faces (IMAGE) and the chosen faces (MASK). See `preview_size` for their size."""
    count = len(pictures)
    height, width = pictures[0].shape[:2]
    size = preview_size(count, height, width)
    drawn = (
        draw_preview(check_image(picture, number, count), found[number], chosen[number], size=size)
        for number, picture in enumerate(pictures)
    )
    boxes = torch.zeros(count, *size)
    for number, faces in enumerate(chosen):
        boxes[number] = face_mask(faces, height, width, size)
    return to_image(drawn, count), boxes


def crops_to_image(crops: Tensor) -> Tensor:
    """Convert recogniser input (F, 3, H, W), RGB in [-1, 1], to IMAGE (F, H, W, 3) in 0..1."""
    return ((crops + 1) / 2).movedim(1, -1).contiguous().cpu()


def picture_ui(node: type[io.ComfyNode], pictures: Sequence[Image]) -> dict[str, Any]:
    """Return the UI output that shows pictures (H, W, 3), RGB uint8, of any sizes in a node."""
    if not pictures:
        return {}
    shown: dict[str, Any] = ui.PreviewImage(
        [to_image([picture], 1)[0] for picture in pictures], cls=node
    ).as_dict()
    return shown
