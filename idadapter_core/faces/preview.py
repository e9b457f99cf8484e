"""Pictures of what the detector found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as PILImage, ImageDraw, ImageFont
from torch import Tensor

from ..types import Face
from .images import Image

CHOSEN_COLOR = (40, 220, 80)
OTHER_COLOR = (255, 180, 40)


def draw_preview(image: Image, found: Sequence[Face], chosen: Sequence[Face]) -> Image:
    """A copy of the photo (H, W, 3), RGB uint8, with a box, number and score for each face.

    The numbers are the positions in `found`: pass the faces in selection order, and they are the values of `index`.
    Chosen faces have a thick green box and a filled label, the others a thin orange one.
    """
    picture = PILImage.fromarray(image)
    draw = ImageDraw.Draw(picture)
    short_side = min(picture.size)
    font = ImageFont.load_default(size=max(12, round(short_side / 28)))
    thin = max(1, round(short_side / 300))
    for number, face in enumerate(found):
        is_chosen = face in chosen
        color = CHOSEN_COLOR if is_chosen else OTHER_COLOR
        draw.rectangle(face.box, outline=color, width=3 * thin if is_chosen else thin)
        label = f"{number}  {face.score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        width, height = right + 2 * thin + 2, bottom + 2 * thin + 2
        # Above the box, but always inside the picture.
        x = min(max(face.box[0], 0), max(picture.width - width, 0))
        y = min(max(face.box[1] - height, 0), max(picture.height - height, 0))
        draw.rectangle((x, y, x + width, y + height), fill=color if is_chosen else (0, 0, 0), outline=color)
        draw.text((x + thin + 1, y + thin + 1), label, fill=(0, 0, 0) if is_chosen else color, font=font)
    return np.array(picture, dtype=np.uint8)


def face_mask(faces: Sequence[Face], height: int, width: int) -> Tensor:
    """A mask (height, width), float32: 1 inside the box of any of the faces, 0 elsewhere."""
    mask = torch.zeros(height, width)
    for face in faces:
        x1, y1, x2, y2 = face.box
        mask[max(round(y1), 0) : max(round(y2), 0), max(round(x1), 0) : max(round(x2), 0)] = 1
    return mask
