"""Rows, indexes, photos and samples of them, for the tests of samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from idadapter_core.config import parse_config
from idadapter_core.data.index import Index, Row, write_index
from idadapter_core.data.references import Photo
from idadapter_core.faces.align import TEMPLATE
from idadapter_core.training.config import RunConfig
from idadapter_core.training.samples import Batch, Samples
from tests.tiny.face_package import DOT_COLORS, MarkedFace, synthesize

MIRRORED = [1, 0, 2, 4, 3]
TIMESTEPS = 1000

# Width and height of a photo, and its face: in the middle, near an edge, turned, in a corner.
SHOTS: dict[str, tuple[int, int, MarkedFace]] = {
    "square": (240, 240, MarkedFace(120, 118, 60)),
    "landscape": (400, 240, MarkedFace(250, 118, 60, roll=15)),
    "at the left edge": (400, 240, MarkedFace(62, 118, 60)),
    "at the right edge": (401, 241, MarkedFace(340, 118, 60, yaw=12)),
    "portrait, at the bottom": (240, 420, MarkedFace(118, 350, 60)),
    "small": (110, 100, MarkedFace(60, 50, 34)),
}


def row_of(number: int, identity: str = "somebody", **values: Any) -> Row:
    """A row that is ok, of a photo that nobody opens."""
    given: dict[str, Any] = {
        "source": f"{identity}/{number}.png",
        "sha256": f"{number:064x}",
        "width": 200,
        "height": 100,
        "box": (60.0, 20.0, 120.0, 90.0),
        "landmarks": tuple(map(tuple, (TEMPLATE / 2 + [60, 20]).tolist())),
        "split": "train",
        **values,
    }
    return Row(number=number, identity=identity, **given)


def index_of(folder: Path, rows: list[Row]) -> Index:
    return write_index(folder / "index.jsonl", folder, rows, torch.zeros(len(rows), 512), {})


def draw(folder: Path, width: int, height: int, face: MarkedFace) -> tuple[Index, Row]:
    """A photo on disk, with the index of it alone."""
    path = folder / "photo.png"
    Image.fromarray(synthesize(width, height, [face])).save(path)
    x1, y1 = face.landmarks.min(0) - 0.4 * face.eye_distance
    x2, y2 = face.landmarks.max(0) + 0.4 * face.eye_distance
    row = row_of(
        0,
        source=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        width=width,
        height=height,
        box=(float(x1), float(y1), float(x2), float(y2)),
        # Dots are painted at whole pixels.
        landmarks=tuple((float(x), float(y)) for x, y in face.landmarks.round()),
    )
    return index_of(folder, [row]), row


def dots(picture: NDArray[Any]) -> NDArray[np.float64]:
    """Where the five colours are in a picture (H, W, 3) in 0..255: (5, 2)."""
    found = []
    for color in DOT_COLORS:
        distance = np.linalg.norm(picture.astype(float) - color, axis=-1)
        ys, xs = np.nonzero(distance < 120)
        assert len(xs), color
        weight = 120 - distance[ys, xs]
        found.append((np.average(xs, weights=weight), np.average(ys, weights=weight)))
    return np.array(found)


def levels(tensor: Tensor) -> NDArray[Any]:
    return ((tensor.movedim(0, -1) + 1) * 127.5).numpy()


def config_of(**sections: dict[str, Any]) -> RunConfig:
    content: dict[str, Any] = {"data": {"resolution": 64, "references": 2}, **sections}
    return parse_config(RunConfig, content)


class Zeros:
    """A store that answers at once, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.mirrored: list[bool] = []

    def latents(self, row: Row, mirrored: bool) -> Tensor:
        self.mirrored.append(mirrored)
        return torch.zeros(8, 8, 8)

    def photo(self, photo: Photo) -> Mapping[str, Tensor]:
        features = torch.tensor([float(photo.row.number), float(photo.variant)])
        return {"embedding": features, "patch_tokens": features[None], "class_embedding": features}


def fast(rows: list[Row], config: RunConfig, store: Zeros | None = None) -> Samples:
    """Samples without pictures."""
    index = Index(Path("index.jsonl"), Path(), tuple(rows), {}, "")
    return Samples(index, rows, config, TIMESTEPS, store or Zeros())


def same(one: Mapping[str, Any] | Batch, other: Mapping[str, Any] | Batch) -> bool:
    """Whether two samples or batches hold the same bits."""
    left, right = (
        {f.name: getattr(side, f.name) for f in dataclasses.fields(side)} if isinstance(side, Batch) else side
        for side in (one, other)
    )
    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple) and one and isinstance(one[0], Tensor):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def small_heads(heads: Any) -> Tensor:
    return torch.stack([torch.from_numpy(head[:32, :32].copy()).movedim(-1, 0).float() for head in heads])
