"""File layout of IDAdapter. It is this project's own, because no weights were ever published."""

from __future__ import annotations

from dataclasses import replace

from ...published import ADAPTERS, BUFFALO_L, CLIP_VIT_L, SD15_OR_SDXL, PublishedFile
from ..method import Files, ForeignFormat

FILES = Files(
    layers_prefix="layers.",
    layers_head="layers.",
    foreign_formats=(
        ForeignFormat(
            r"^layers\.(?:gates|deltas)\.\d",
            "an IDAdapter without its config, which stands in the metadata of the .safetensors file",
            "export or copy the original file again, without converting it",
        ),
    ),
)

PUBLISHED = (
    replace(
        SD15_OR_SDXL,
        name="an SD1.5, SD2.1 or SDXL checkpoint, as the adapter is for",
        families=("SD1.5", "SD2.1", "SDXL"),
    ),
    PublishedFile(
        "adapter",
        "an IDAdapter, which you train (nobody has published one)",
        ADAPTERS,
        "docs/training.md of this pack",
        "yours, within those of base model, face network and photos",
    ),
    CLIP_VIT_L,
    BUFFALO_L,
)
