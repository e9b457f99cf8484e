"""Photos are decoded upright, whole, in sRGB, and by the formats that are meant alone."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from idadapter_core.data import photos
from idadapter_core.data.photos import decode, decode_with_note, suffix
from idadapter_core.errors import InputError
from tests.tiny import profiles


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


def to_srgb(values: tuple[int, int, int], primaries: object, gamma: float) -> np.ndarray:
    """A colour of a screen with these primaries in sRGB, by the formulas."""
    xyz = np.asarray(primaries) @ (np.asarray(values) / 255) ** gamma
    linear = np.linalg.solve(np.asarray(profiles.SRGB), xyz).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


class TestColours:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
    def test_a_wide_gamut_becomes_srgb(self, mode: str) -> None:
        colour = (200, 120, 60)
        profile = profiles.rgb_profile(profiles.DISPLAY_P3, 2.2)
        plain = Image.new("RGB", (4, 4), colour)
        picture = plain.quantize() if mode == "P" else plain.convert(mode)
        image, note = decode_with_note(stored(picture, icc_profile=profile))
        expected = to_srgb(colour, profiles.DISPLAY_P3, 2.2)
        assert np.abs(image[0, 0] - expected).max() <= 2
        assert np.abs(expected - colour).max() > 10
        assert note == ""

    def test_srgb_stays_as_it_is(self) -> None:
        """To the bit: most photos carry a profile that says sRGB."""
        photo = random_photo()
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        np.testing.assert_array_equal(decode(stored(photo, icc_profile=profile)), np.asarray(photo))

    @pytest.mark.parametrize("profile", [profiles.grey_profile(1), profiles.rgb_profile(profiles.SRGB, 1)])
    def test_grey(self, profile: bytes) -> None:
        expected = to_srgb((55, 55, 55), profiles.SRGB, 1)
        assert (
            np.abs(decode(stored(Image.new("L", (4, 4), 55), icc_profile=profile))[0, 0] - expected).max()
            <= 2
        )
        deep = Image.fromarray(np.full((4, 4), 55 * 257, np.uint16))
        assert np.abs(decode(stored(deep, icc_profile=profile))[0, 0] - expected).max() <= 2

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
    def test_inks(self, kind: str) -> None:
        cyan, profile = Image.new("CMYK", (16, 16), (255, 0, 0, 0)), profiles.black_ink_profile()
        assert np.abs(decode(stored(cyan, kind))[5, 5].astype(int) - (0, 255, 255)).max() <= 2
        assert decode(stored(cyan, kind, icc_profile=profile)).min() >= 253
        half = decode(stored(Image.new("CMYK", (16, 16), (0, 0, 0, 128)), kind, icc_profile=profile))
        assert np.abs(half.astype(int) - 119).max() <= 2  # L* 50

    def test_hidden_pixels_stay_hidden(self) -> None:
        picture = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
        profile = profiles.rgb_profile(profiles.DISPLAY_P3, 1.8)
        assert decode(stored(picture, icc_profile=profile)).min() == 255

    @pytest.mark.parametrize(
        ("mode", "kind", "profile"),
        [
            ("RGB", "PNG", b"no profile"),
            ("RGB", "JPEG", profiles.rgb_profile(profiles.DISPLAY_P3, 2.2)[:300]),
            ("RGB", "PNG", profiles.black_ink_profile()),
            ("RGB", "PNG", profiles.grey_profile(1)),
            ("CMYK", "JPEG", profiles.rgb_profile(profiles.DISPLAY_P3, 2.2)),
        ],
        ids=["damaged", "cut off", "of inks", "of grey", "of a screen"],
    )
    def test_a_profile_that_cannot_be_used(self, mode: str, kind: str, profile: bytes) -> None:
        photo = random_photo().convert(mode)
        image, note = decode_with_note(stored(photo, kind, icc_profile=profile))
        assert note == photos.SRGB_NOTE
        np.testing.assert_array_equal(image, decode(stored(photo, kind)))

    def test_floating_point_is_refused(self) -> None:
        """Pillow would clip 0..1 to black."""
        with pytest.raises(InputError, match="floating point.*8 or 16 bits"):
            decode(stored(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"))


class TestFormats:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
    def test_what_is_meant(self, kind: str) -> None:
        if kind == "AVIF" and not features.check("avif"):
            pytest.skip("this Pillow reads no AVIF")
        content = stored(Image.new("RGB", (40, 40), (200, 0, 0)), kind)
        assert np.abs(decode(content)[9, 9].astype(int) - (200, 0, 0)).max() <= 6
        assert f".{suffix(content)}" in photos.PHOTO_SUFFIXES

    def test_the_first_frame(self) -> None:
        red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
        content = stored(red, "GIF", save_all=True, append_images=[blue])
        assert tuple(decode(content)[0, 0]) == (255, 0, 0)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\nshowpage\n", "PostScript"),
            (b"%PDF-1.4\n", "PDF"),
            (stored(random_photo(), "PPM"), "of a kind that is not read"),
            (stored(random_photo(), "TGA"), "of a kind that is not read"),
            (stored(random_photo(), "ICO"), "of a kind that is not read"),
            (stored(random_photo(), "PCX"), "of a kind that is not read"),
            (b"\0\5\x16\7" + bytes(60), "AppleDouble"),
            (b"<!DOCTYPE html><html>", "web page"),
        ],
    )
    def test_no_other_is_opened(self, content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*arguments: object, **options: object) -> None:
            raise AssertionError(f"a program was started: {arguments}")

        monkeypatch.setattr("subprocess.Popen", start)
        with pytest.raises(InputError, match=reason):
            decode(content)

    @pytest.fixture
    def without_heif(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        for cached in (photos._registers_heif, photos._formats):
            cached.cache_clear()
        yield
        for cached in (photos._registers_heif, photos._formats):
            cached.cache_clear()

    @pytest.mark.usefixtures("without_heif")
    def test_heic_without_its_library(self) -> None:
        assert set(photos.unread_suffixes()) >= {".heic", ".heif", ".hif"}
        with pytest.raises(InputError, match="HEIC.*pip install pillow-heif"):
            decode(b"\0\0\0\x18ftypheic" + bytes(40))

    def test_heic_with_its_library(self) -> None:
        pytest.importorskip("pillow_heif")
        assert ".heic" not in photos.unread_suffixes()
        content = stored(Image.new("RGB", (64, 64), (200, 0, 0)), "HEIF")
        assert np.abs(decode(content)[9, 9].astype(int) - (200, 0, 0)).max() <= 6
        assert suffix(content) == "heic"
        with pytest.raises(InputError, match="damaged"):
            decode(b"\0\0\0\x18ftypheic" + bytes(40))
