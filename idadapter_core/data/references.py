"""Reference photos of a person: crops, variants, and the features that an adapter reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FaceError
from ..faces.align import align_face, square_crop
from ..faces.enrich import variant
from ..faces.features import crops_to_tensor
from ..faces.images import Image
from ..methods import views_read
from ..randomness import seed_of
from ..stable_diffusion.networks import Networks, encode_heads, encode_views
from ..types import Face, FaceFeatures, ViewKey
from .index import Index
from .people import People, photos_beside_target
from .rows import Row, Rows, as_rows

Preprocess = Callable[[Sequence[Image]], Tensor]
_SEX = {"man": "M", "woman": "F"}


@dataclass(frozen=True)
class PhotoVariant:
    """A photo of a person: the row unchanged (0) or one of its variants (1, 2, ...)."""

    row: Row
    variant: int = 0


def photo_pictures(image: Image, photo: PhotoVariant) -> tuple[Image, Image]:
    """Crop the aligned face (112, 112, 3) and the head (S, S, 3) from a photo, RGB uint8, as Extract Face Features does.

    Variants depend only on the photo, not on the run, so that runs can share a cache. A variant that would rotate more than half of the
    face out of the image is replaced by the unchanged photo.

    Args:
        image: the row's photo (H, W, 3), RGB uint8.
    """
    row = photo.row
    assert row.box is not None  # rows that are ok have a face
    assert row.landmarks is not None
    x1, y1, x2, y2 = row.box
    points = np.array([*row.landmarks, ((x1 + x2) / 2, (y1 + y2) / 2)], np.float64)
    if photo.variant:
        with suppress(FaceError):
            return _cut_out(*variant(image, points, seed_of(row.sha256), photo.variant), row)
    return _cut_out(image, points, row)


def _cut_out(image: Image, points: NDArray[np.float64], row: Row) -> tuple[Image, Image]:
    """Crop the aligned face and the head at six points (6, 2): the landmarks and the middle of the row's box."""
    assert row.box is not None
    x1, y1, x2, y2 = row.box
    x, y = points[5].tolist()
    half_width, half_height = (x2 - x1) / 2, (y2 - y1) / 2
    face = Face(
        box=(x - half_width, y - half_height, x + half_width, y + half_height),
        landmarks=tuple((px, py) for px, py in points[:5].tolist()),
        score=row.score,
        image_size=(row.width, row.height),
    )
    return align_face(image, face.landmarks), square_crop(image, face)


def photo_tensors(image: Image, photo: PhotoVariant, preprocess: Preprocess | None) -> dict[str, Tensor]:
    """Tensors of a photo: `crops` (3, 112, 112) in -1..1 and, for CLIP vision, `heads` (3, S, S). `image` is the row's (H, W, 3)."""
    crop, head = photo_pictures(image, photo)
    tensors = {"crops": crops_to_tensor([crop])[0]}
    if preprocess is not None:
        tensors["heads"] = preprocess([head])[0]
    return tensors


def variants_of(rows: Rows, references: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """All photos that `references_for` may choose for the people of these rows, as positions and variant numbers.

    First come the unchanged rows, then the variants by person. 0 references: no variants.
    """
    people = People(rows)
    sizes = people.sizes
    most = int(sizes.max(initial=0))
    last = [max(references - 1, 0) // photos_beside_target(size) for size in range(most + 1)]
    counts = np.repeat(np.array(last)[sizes], sizes)  # of each row, in the order of `people.order`
    ends = np.cumsum(counts)
    numbers = np.arange(1, 1 + counts.sum()) - np.repeat(ends - counts, counts)
    positions = np.concatenate([np.arange(len(rows)), np.repeat(people.order, counts)])
    return positions.astype(np.uint32), np.concatenate([np.zeros(len(rows)), numbers]).astype(np.uint32)


def references_for(
    target: Row, person: Sequence[Row], count: int, random: torch.Generator
) -> list[PhotoVariant]:
    """Draw N reference photos of a person, in random order, without the target.

    If there are too few, variants of them are added. A person with a single photo gets that photo and its variants.
    """
    rows = as_rows(person)
    others = np.flatnonzero(
        rows.column("number") != target.number
    ).tolist()  # only few of many photos are looked up
    order = torch.randperm(len(others) or 1, generator=random).tolist()
    chosen = [rows[others[place]] for place in order[:count]] if others else [target]
    return [PhotoVariant(chosen[n % len(order)], n // len(order)) for n in range(count)]


def features_of(
    index: Index,
    rows: Sequence[Row],
    networks: Networks,
    recognizer: str,
    device: torch.device | str,
    read: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> FaceFeatures:
    """The features of rows of one person, as computed by Extract Face Features.

    Args:
        recognizer: its name on record.
        read: calls the function that reads the photos and returns its result.
    """
    photos = read(lambda: [index.load(row) for row in rows])
    pictures = [photo_pictures(photo, PhotoVariant(row)) for photo, row in zip(photos, rows, strict=True)]
    crops = crops_to_tensor([crop for crop, _ in pictures])
    faces = tuple(
        Face(
            box=row.box or (0.0, 0.0, 0.0, 0.0),
            landmarks=row.landmarks or (),
            score=row.score,
            image_size=(row.width, row.height),
            sex=_SEX.get(row.class_noun),
        )
        for row in rows
    )
    with torch.no_grad():
        embedding, stages = networks.recognizer(crops.to(device))
    seen: dict[str, Tensor] = {}
    views: dict[ViewKey, Tensor] = {}
    if networks.vision is not None:
        views = encode_views(networks.vision, views_read(), list(zip(photos, faces, strict=True)), device)
        seen = encode_heads(
            networks.vision, networks.vision.preprocess([head for _, head in pictures]).to(device)
        )
    return FaceFeatures(
        embedding=embedding.cpu(),
        stages=tuple(stage.cpu() for stage in stages),
        patch_tokens=seen["patch_tokens"].cpu() if seen else None,
        class_embedding=seen["class_embedding"].cpu() if seen else None,
        faces=faces,
        recognizer=recognizer,
        crops=crops,
        vision="" if networks.vision is None else networks.vision.digest,
        views=views,
    )
