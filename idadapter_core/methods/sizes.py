"""Sizes that new adapters of any method choose alike."""

from __future__ import annotations


def head_width(*widths: int) -> int:
    """Width of an attention head: 64, or less where the widths are no multiples of that."""
    return next(size for size in (64, 32, 16, 8, 4, 2, 1) if all(width % size == 0 for width in widths))
