"""File layout of IDAdapter. It is this project's own, because no weights were ever published."""

from __future__ import annotations

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
