"""Conversion between ComfyUI's IMAGE and MASK and the core's photos. Layouts change nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...idadapter_core.errors import InputError
from ...idadapter_core.faces.features import Extraction
from ...idadapter_core.faces.images import Image, check_image, require_image
from ...idadapter_core.faces.preview import (
    draw_preview,
    face_mask,
    preview_size,
    small_preview,
    worth_showing,
)
from ...idadapter_core.types import Face


def photos(*batches: Tensor) -> list[Tensor]:
    """Split IMAGEs (B, H, W, C) in 0..1 into checked photos. `check_image` converts one to (H, W, 3), RGB uint8.

    Photos are not converted here, because a video would take gigabytes.

    Raises:
        InputError: wrong shape, NaN, or too small; names the photo.
    """
    for image in batches:
        if image.ndim != 4:
            raise InputError(
                f"expected an IMAGE of shape (batch, height, width, channels), got {tuple(image.shape)}; "
                "repair the node that made it"
            )
    found = [photo for image in batches for photo in image]
    for index, photo in enumerate(found):
        require_image(photo, index, len(found))
    return found


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
    """Draw photos with boxes around their faces (IMAGE) and the chosen faces (MASK), as one batch.

    Photos of different shapes lie at the top left of a canvas that holds the largest. See `preview_size` for the size.
    """
    count = len(pictures)
    height, width = (max(picture.shape[side] for picture in pictures) for side in (0, 1))
    size = preview_size(count, height, width)
    preview, boxes = torch.zeros(count, *size, 3), torch.zeros(count, *size)
    for number, picture in enumerate(pictures):
        own = picture.shape[:2]
        shown = (
            max(round(own[0] * size[0] / height), 1),
            max(round(own[1] * size[1] / width), 1),
        )
        pixels = check_image(picture, number, count)
        drawn = draw_preview(pixels, found[number], chosen[number], size=shown)
        preview[number, : shown[0], : shown[1]] = torch.from_numpy(drawn)
        boxes[number, : shown[0], : shown[1]] = face_mask(chosen[number], own[0], own[1], shown)
    return preview.div_(255), boxes


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


def found_pictures(
    pictures: Sequence[Tensor], extraction: Extraction, not_used: Collection[int] = ()
) -> list[Image]:
    """Return small photos with face boxes, those left out with a red frame. If there are too many to show, these have priority.

    Args:
        not_used: numbers of photos that are left out although a face was found.
    """
    chosen = [() if i in not_used else faces for i, faces in enumerate(extraction.chosen)]
    left_out = {i for i, faces in enumerate(chosen) if not faces}
    shown = worth_showing(len(pictures), left_out)
    return [
        small_preview(check_image(pictures[i]), extraction.found[i], chosen[i], f"image {i + 1}")
        for i in shown
    ]
