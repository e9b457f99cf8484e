"""Pictures of what the detector found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as PILImage, ImageDraw, ImageFont
from torch import Tensor

from ..types import Face
from .images import Image

CHOSEN_COLOR = (40, 220, 80)
OTHER_COLOR = (255, 180, 40)

FEW = 16  # photos: so many are shown as large as they are
SHOWN_PIXELS = 2**24  # of all pictures of a larger batch
LEAST_SHARE = 1 / 4  # of a photo's sides: smaller pictures would show nothing


def shown_size(count: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of pictures of `count` photos: the photos' own, or smaller for a video, whose photos fill the memory."""
    if count <= FEW:
        return height, width
    share = min(1.0, max(LEAST_SHARE, math.sqrt(SHOWN_PIXELS / (count * height * width))))
    return max(round(height * share), 1), max(round(width * share), 1)


def draw_preview(
    image: Image, found: Sequence[Face], chosen: Sequence[Face], size: tuple[int, int] | None = None
) -> Image:
    """A copy of the photo (H, W, 3), RGB uint8, with a box, number and score for each face.

    The numbers are the positions in `found`: pass the faces in selection order, and they are the values of `index`.
    Chosen faces have a thick green box and a filled label, the others a thin orange one.

    Args:
        size: (height, width) to draw it at; None is the photo's own.
    """
    picture = PILImage.fromarray(image)
    if size is not None and size != image.shape[:2]:
        picture = picture.resize(size[::-1], PILImage.Resampling.BOX)
    scale_x, scale_y = picture.width / image.shape[1], picture.height / image.shape[0]
    draw = ImageDraw.Draw(picture)
    short_side = min(picture.size)
    font = ImageFont.load_default(size=max(12, round(short_side / 28)))
    thin = max(1, round(short_side / 300))
    for number, face in enumerate(found):
        is_chosen = face in chosen
        color = CHOSEN_COLOR if is_chosen else OTHER_COLOR
        x1, y1, x2, y2 = face.box
        box = (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y)
        draw.rectangle(box, outline=color, width=3 * thin if is_chosen else thin)
        label = f"{number}  {face.score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        width, height = right + 2 * thin + 2, bottom + 2 * thin + 2
        # Above the box, but always inside the picture.
        x = min(max(box[0], 0), max(picture.width - width, 0))
        y = min(max(box[1] - height, 0), max(picture.height - height, 0))
        draw.rectangle((x, y, x + width, y + height), fill=color if is_chosen else (0, 0, 0), outline=color)
        draw.text((x + thin + 1, y + thin + 1), label, fill=(0, 0, 0) if is_chosen else color, font=font)
    return np.array(picture, dtype=np.uint8)


def face_mask(faces: Sequence[Face], height: int, width: int, size: tuple[int, int] | None = None) -> Tensor:
    """A mask, float32: 1 inside the box of any of the faces of a photo (height, width), 0 elsewhere.

    Args:
        size: (height, width) of the mask; None is the photo's own. A box covers one pixel at least.
    """
    rows, columns = size or (height, width)
    mask = torch.zeros(rows, columns)
    for face in faces:
        x1, y1, x2, y2 = face.box
        left, right = _span(x1 * columns / width, x2 * columns / width)
        top, bottom = _span(y1 * rows / height, y2 * rows / height)
        mask[top:bottom, left:right] = 1
    return mask


def _span(start: float, end: float) -> tuple[int, int]:
    first = max(round(start), 0)
    return first, max(round(end), first + 1 if end > 0 else 0)
