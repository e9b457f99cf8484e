"""Decoding photo files: upright, RGB, whole or not at all."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image as Pillow, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..faces.images import MAX_SIDE, Image

MAX_PIXELS = 100_000_000
"""Larger pictures are not decoded: a small file can claim to be one that fills the memory."""
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9A-Fa-f]+>")
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode(content: bytes) -> Image:
    """A photo file's bytes as (H, W, 3), RGB uint8, turned upright by its EXIF tag, with transparency laid on white.

    Decoded twice: Pillow's checksums first, then every pixel. Only the first frame of an animation is read.

    Raises:
        InputError: no picture, a truncated or damaged one, or more than 100 million pixels. The message is the same each time.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that Pillow finds suspicious, and of odd EXIF data
            with Pillow.open(io.BytesIO(content)) as picture:
                _check_size(picture.size)
                picture.verify()
            with Pillow.open(io.BytesIO(content)) as picture:
                picture.load()
                return _rgb(ImageOps.exif_transpose(picture))
    except InputError:
        raise
    except Pillow.DecompressionBombError as error:  # Pillow's own limit is higher
        raise InputError(f"more than {MAX_PIXELS // 10**6} million pixels are not decoded") from error
    except UnidentifiedImageError as error:
        raise InputError("no picture, or of a kind that Pillow cannot read") from error
    except Exception as error:  # whatever the damage leads to: SyntaxError, struct.error, IndexError, ...
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"cannot be decoded: {_ADDRESS.sub('the file', reason)[:200]}") from error


def suffix(content: bytes) -> str:
    """The usual file name ending of a photo's format, for example "jpg"; by its content, whatever its name was."""
    with Pillow.open(io.BytesIO(content)) as picture:
        name = (picture.format or "").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(name, name)


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise InputError(
            f"{width}x{height} pixels; at most {MAX_PIXELS // 10**6} million in all and {MAX_SIDE} on a side are decoded"
        )


def _rgb(picture: Pillow.Image) -> Image:
    if picture.mode in _DEEP_GREY:
        levels = np.asarray(picture).astype(np.float64) / 257  # 16 bits; Pillow's own conversion clips at 255
        return np.repeat(levels.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Pillow.new("RGBA", picture.size, "white")
        picture = Pillow.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"), dtype=np.uint8)
