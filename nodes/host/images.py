"""ComfyUI's IMAGE and MASK to core's photos and back: the only place where layout changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...idadapter_core.errors import InputError
from ...idadapter_core.faces.images import Image, check_image


def photos(image: Tensor) -> list[Image]:
    """IMAGE (B, H, W, C) in 0..1 -> B photos (H, W, 3), RGB uint8.

    Raises:
        InputError: another shape, NaN, or too small; names the photo.
    """
    if image.ndim != 4:
        raise InputError(
            f"expected an IMAGE of shape (batch, height, width, channels), got {tuple(image.shape)}"
        )
    return [check_image(photo, index, image.shape[0]) for index, photo in enumerate(image)]


def to_image(pictures: Sequence[Image]) -> Tensor:
    """Pictures (H, W, 3), RGB uint8, of one size -> IMAGE (B, H, W, 3) in 0..1."""
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).float() / 255


def crops_to_image(crops: Tensor) -> Tensor:
    """Recogniser input (F, 3, H, W), RGB in [-1, 1] -> IMAGE (F, H, W, 3) in 0..1."""
    return ((crops + 1) / 2).movedim(1, -1).contiguous().cpu()


def picture_ui(node: type[io.ComfyNode], pictures: Sequence[Image]) -> dict[str, Any]:
    """The part of a node's UI output that shows pictures (H, W, 3), RGB uint8, of any sizes in it."""
    if not pictures:
        return {}
    shown: dict[str, Any] = ui.PreviewImage(
        [to_image([picture])[0] for picture in pictures], cls=node
    ).as_dict()
    return shown
