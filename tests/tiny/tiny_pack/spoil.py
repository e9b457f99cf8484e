"""Nodes that make what no stock node makes: broken images and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Spoiler = Callable[[torch.Tensor], torch.Tensor]

_IMAGES: dict[str, Spoiler] = {
    "nan": lambda image: torch.where(torch.arange(image.shape[2])[:, None] < 8, torch.nan, image),
    "grey": lambda image: image.mean(dim=-1, keepdim=True),
    "two channels": lambda image: image[..., :2],
    "no batch": lambda image: image[0],
    "0 to 255": lambda image: image * 255,
}
_MASKS: dict[str, Spoiler] = {
    "nan": lambda mask: torch.full_like(mask, torch.nan),
    "no batch": lambda mask: mask[0],
    "four dimensions": lambda mask: mask[None],
}


class SpoilImage:
    CATEGORY = "testing"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "spoil"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"image": ("IMAGE",), "kind": (list(_IMAGES),)}}

    def spoil(self, image: torch.Tensor, kind: str) -> tuple[torch.Tensor]:
        return (_IMAGES[kind](image),)


class SpoilMask:
    CATEGORY = "testing"
    RETURN_TYPES = ("MASK",)
    FUNCTION = "spoil"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"mask": ("MASK",), "kind": (list(_MASKS),)}}

    def spoil(self, mask: torch.Tensor, kind: str) -> tuple[torch.Tensor]:
        return (_MASKS[kind](mask),)
