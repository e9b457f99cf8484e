"""Preview pictures of detected faces and of the faces used for an identity."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image as PILImage, ImageDraw, ImageFont
from torch import Tensor

from ..mixing import select_references
from ..types import Face, FaceFeatures, Mix
from .images import Image, crops_to_pixels

CHOSEN_COLOR = (40, 220, 80)
OTHER_COLOR = (255, 180, 40)
LEFT_OUT_COLOR = (235, 40, 40)
MOST_SHOWN = 8  # maximum pictures in a node; a video has hundreds of frames
LONGEST_SIDE = 768  # pixels of a picture in a node
_EMPHASIS = 1.8  # enlarges lines and numbers, because a node is about a third of a picture wide
_TILE = LONGEST_SIDE // 3
_GROUND = (48, 48, 48)

FEW = 16  # batches of up to this many photos are output at full size
GIVEN_PIXELS = 2**24  # total output pixels of a larger batch
LEAST_SHARE = 1 / 4  # minimum scale of a photo's sides; smaller pictures would be unreadable


def preview_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of pictures of `count` photos: the photos' size, or less for a video, to save memory."""
    if count <= FEW:
        return height, width
    share = min(1.0, max(LEAST_SHARE, math.sqrt(GIVEN_PIXELS / (count * height * width))))
    return max(round(height * share), 1), max(round(width * share), 1)


def draw_preview(
    image: Image,
    found: Sequence[Face],
    chosen: Sequence[Face],
    emphasis: float = 1.0,
    size: tuple[int, int] | None = None,
    first: int = 0,
) -> Image:
    """Draw a copy of the photo (H, W, 3), RGB uint8, with a box, number and score for each face.

    The numbers are positions in `found`, counted from `first`: with faces in selection order, they are the values of `index`. Chosen faces have a
    thick green box and a filled label, the others a thin orange one. `emphasis` scales labels and line widths.

    Args:
        size: (height, width) of the result, with the photo's aspect ratio; None: the photo's own size.
    """
    picture = PILImage.fromarray(image)
    if size is not None and size != image.shape[:2]:
        picture = picture.resize(size[::-1], PILImage.Resampling.BOX)
    scale_x, scale_y = picture.width / image.shape[1], picture.height / image.shape[0]
    draw = ImageDraw.Draw(picture)
    short_side = min(picture.size)
    font = ImageFont.load_default(size=max(12, round(emphasis * short_side / 28)))
    thin = max(1, round(emphasis * short_side / 300))
    for number, face in enumerate(found, first):
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


def small_preview(
    image: Image, found: Sequence[Face], chosen: Sequence[Face], name: str = "", first: int = 0
) -> Image:
    """`draw_preview` on a copy whose longer side is at most 768 px. A skipped photo (no chosen face) gets a red frame with `name`."""
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    drawn = draw_preview(image, found, chosen, _EMPHASIS, size, first)
    return drawn if chosen else _framed(drawn, f"{name} left out".strip(), LEFT_OUT_COLOR)


def crop_sheet(crops: Tensor, captions: Sequence[str], left_out: Collection[int]) -> Image:
    """Arrange all faces in one picture, up to three per row, each with a caption: those in `left_out` framed red, others green.

    `crops`: recogniser inputs (F, 3, H, W), RGB in [-1, 1], at least one.
    """
    columns = math.ceil(math.sqrt(len(crops)))
    rows = math.ceil(len(crops) / columns)
    sheet = PILImage.new("RGB", (_TILE * columns, _TILE * rows), _GROUND)
    for i, (crop, caption) in enumerate(zip(crops_to_pixels(crops), captions, strict=True)):
        tile = np.array(PILImage.fromarray(crop).resize((_TILE, _TILE)), dtype=np.uint8)
        color = LEFT_OUT_COLOR if i in left_out else CHOSEN_COLOR
        corner = (i % columns * _TILE, i // columns * _TILE)
        sheet.paste(PILImage.fromarray(_framed(tile, caption, color)), corner)
    return np.array(sheet, dtype=np.uint8)


def portrait(features: FaceFeatures, mix: Mix) -> Tensor | None:
    """Return the crop (112, 112, 3), RGB uint8, of the face that counts most in a mix, the surest among equals; None without crops."""
    chosen, weights = select_references(features, mix)
    if chosen.crops is None:
        return None
    order = [(float(weights[i]), chosen.faces[i].score if chosen.faces else 0.0) for i in range(len(weights))]
    best = max(range(len(order)), key=order.__getitem__)
    return torch.from_numpy(crops_to_pixels(chosen.crops[best : best + 1])[0])


def worth_showing(count: int, first: Collection[int]) -> list[int]:
    """Select the pictures (of `count`) that a node shows, in order: all, or 8 of them with those in `first` preferred."""
    by_rank = sorted(range(count), key=lambda i: (i not in first, i))
    return sorted(by_rank[:MOST_SHOWN])


def face_mask(faces: Sequence[Face], height: int, width: int, size: tuple[int, int] | None = None) -> Tensor:
    """Draw a float32 mask: 1 inside the box of any face of a photo (height, width), 0 elsewhere.

    Args:
        size: (height, width) of the mask; None: the photo's own size. A box covers at least one pixel.
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


def _framed(image: Image, caption: str, color: tuple[int, int, int]) -> Image:
    """Copy a picture (H, W, 3) and draw a frame inside its edge and a caption in the lower left corner."""
    picture = PILImage.fromarray(image)
    draw = ImageDraw.Draw(picture)
    short_side = min(picture.size)
    width = max(2, round(short_side / 40))
    font = ImageFont.load_default(size=max(12, round(short_side / 11)))
    _, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
    y = picture.height - (bottom - top) - 4 * width
    draw.rectangle((0, y, right + 4 * width, picture.height), fill=color)
    draw.text(
        (2 * width, y + width - top),
        caption,
        fill=(255, 255, 255) if color == LEFT_OUT_COLOR else (0, 0, 0),
        font=font,
    )
    draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=color, width=width)
    return np.array(picture, dtype=np.uint8)
