"""Photos are decoded upright, whole, in RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from idadapter_core.data.photos import decode, suffix
from idadapter_core.errors import InputError


def stored(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def random_photo(width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_plain_photo() -> None:
    photo = random_photo()
    np.testing.assert_array_equal(decode(stored(photo)), np.asarray(photo))


def test_turned_upright_by_exif() -> None:
    photo = random_photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image = decode(stored(photo, exif=exif))
    np.testing.assert_array_equal(image, np.rot90(np.asarray(photo), -1))


def test_transparency_is_white() -> None:
    picture = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    picture.putpixel((3, 4), (10, 20, 30, 255))
    image = decode(stored(picture))
    assert tuple(image[0, 0]) == (255, 255, 255)
    assert tuple(image[4, 3]) == (10, 20, 30)
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([200, 0, 0, 0, 0, 0])
    assert tuple(decode(stored(palette, transparency=0))[5, 5]) == (255, 255, 255)


def test_grey_of_eight_and_sixteen_bits() -> None:
    assert tuple(decode(stored(Image.new("L", (40, 40), 90)))[0, 0]) == (90, 90, 90)
    deep = Image.fromarray(np.full((40, 40), 90 * 257, np.uint16))
    assert tuple(decode(stored(deep))[0, 0]) == (90, 90, 90)


@pytest.mark.parametrize(("width", "height"), [(40_000, 30_000), (12_000, 10_000), (40_000, 10)])
def test_huge_pictures_are_not_decoded(width: int, height: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(InputError, match="100 million"):
        decode(content + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))


@pytest.mark.parametrize(
    "content",
    [
        stored(random_photo(200, 200))[:-4000],
        stored(random_photo(200, 200), "JPEG")[:-4000],
        stored(random_photo())[:20],
        b"",
        b"a photo of a man\n",
    ],
    ids=["png cut off", "jpeg cut off", "header cut off", "empty", "text"],
)
def test_damaged_files(content: bytes) -> None:
    with pytest.raises(InputError) as first:
        decode(content)
    with pytest.raises(InputError) as second:
        decode(content)
    assert str(first.value) == str(second.value), "reasons are written into the index"
    assert " at 0x" not in str(first.value)


def test_the_ending_comes_from_the_content() -> None:
    assert [suffix(stored(random_photo(), kind)) for kind in ("JPEG", "PNG", "WEBP", "TIFF")] == [
        "jpg",
        "png",
        "webp",
        "tif",
    ]
