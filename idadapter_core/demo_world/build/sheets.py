"""Writes sheets of pictures for inspection by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_sheet(pictures: np.ndarray, path: Path, across: int = 8) -> None:
    """Write pictures (N, H, W, 3), uint8, in full rows of `across`."""
    count = len(pictures) // across * across or len(pictures)
    rows = [list(pictures[start : start + across]) for start in range(0, count, across)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows], 0))
    sheet.save(path, quality=85)  # of .webp


def write_pairs(above: np.ndarray, below: np.ndarray, path: Path, across: int = 6) -> None:
    """Write pictures (N, H, W, 3), uint8, in rows, each with one of `below` (N, H, W, 3) under it."""
    rows = []
    for start in range(0, len(above), across):
        for part in (above, below):
            row = list(part[start : start + across])
            row += [np.zeros_like(row[0])] * (across - len(row))
            rows.append(np.concatenate(row, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(path)
