"""Decode photo files: upright, sRGB, completely or not at all."""

from __future__ import annotations

import functools
import importlib
import io
import re
import warnings

import numpy as np
from PIL import Image as Pillow, ImageCms, ImageOps, UnidentifiedImageError, features

from ..errors import InputError
from ..faces.images import MAX_SIDE, Image

MAX_PIXELS = 100_000_000
"""Larger images are not decoded: a small file can declare a size that fills the memory."""
PHOTO_SUFFIXES = (
    *(
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".jpe",
        ".jfif",
        ".jif",
        ".mpo",
        ".apng",
        ".gif",
    ),
    *(".avif", ".heic", ".heif", ".hif"),
)
"""File extensions of photos. If a sample has several photos, the one whose extension comes first is used."""
HEIF_ADVICE = "run `pip install pillow-heif` with this Python to have them read, or export them as JPEG"
AVIF_ADVICE = "this Pillow reads no AVIF: run `pip install --upgrade pillow`, or export them as PNG"
SRGB_NOTE = "the colour profile cannot be used, so colours were taken for sRGB"

_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
# Formats of photos only: Pillow reads about forty formats, some through external programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
_HEIF = re.compile(rb"....ftyp(he|mif|msf)", re.DOTALL)
_AVIF = re.compile(rb"....ftyp(avif|avis)", re.DOTALL)
_KINDS = (
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "is an EPS or PostScript file, which is no photo; convert it to PNG"),
    (re.compile(rb"%PDF"), "is a PDF, which is no photo; convert its pages to PNG"),
    (re.compile(rb"8BPS"), "is a Photoshop file; export it as PNG"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "is a JPEG XL photo, which is not read; convert it to PNG"),
    (re.compile(rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51"), "is a JPEG 2000 photo, which is not read; convert it to PNG"),
    (re.compile(rb"\x00\x05\x16\x07"), "is an AppleDouble file, which macOS writes beside the real one; remove it"),
    (re.compile(rb"\s*(<!DOCTYPE html|<html)", re.IGNORECASE), "is a web page, perhaps of a failed download; get it again"),
)  # fmt: skip
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9A-Fa-f]+>")
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_MAX_DEEP = 65535
_MODES_OF_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_CLOSE = 2  # levels; a profile that changes no colour by more is treated as sRGB


def decode(content: bytes) -> Image:
    """Decode a photo file to (H, W, 3), sRGB uint8, upright by its EXIF tag, with transparency on white.

    Decoded twice: first Pillow's checksums, then every pixel. Only the first frame of an animation is read. Colours are converted with the
    embedded profile; if that is damaged or for another kind of image, they are assumed to be sRGB.

    Raises:
        InputError: not an image, not an accepted format, truncated or damaged, or more than 100 million pixels. The message is the
            same each time.
    """
    return decode_with_note(content)[0]


def decode_with_note(content: bytes) -> tuple[Image, str]:
    """As `decode`, with a note about the photo's colours for counting; "" if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes that Pillow finds suspicious, and odd EXIF data
            with _open(content) as picture:
                _check_size(picture.size)
                picture.verify()
            with _open(content) as picture:
                picture.load()
                return _rgb(ImageOps.exif_transpose(picture))
    except InputError:
        raise
    except Pillow.DecompressionBombError as error:  # Pillow's own limit is higher
        raise InputError(f"more than {MAX_PIXELS // 10**6} million pixels are not decoded") from error
    except UnidentifiedImageError as error:
        raise InputError(_unknown(content)) from error
    except Exception as error:  # damage can raise anything: SyntaxError, struct.error, IndexError, ...
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"cannot be decoded: {_ADDRESS.sub('the file', reason)[:200]}") from error


def suffix(content: bytes) -> str:
    """The usual file extension of a photo's format, for example "jpg". Detected from the content, not from the name."""
    with _open(content) as picture:
        name = (picture.format or "").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif", "heif": "heic"}.get(name, name)


def unread_suffixes() -> dict[str, str]:
    """Those of PHOTO_SUFFIXES that cannot be read here, each with a way to enable it."""
    unread: dict[str, str] = {}
    if not _registers_heif():
        unread |= dict.fromkeys(_HEIF_SUFFIXES, HEIF_ADVICE)
    if "AVIF" not in _formats():
        unread[".avif"] = AVIF_ADVICE
    return unread


def codecs() -> dict[str, bool]:
    """Which optional formats can be read here. The results of a scan depend on it."""
    return {"avif": "AVIF" in _formats(), "heif": _registers_heif()}


def _open(content: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(content), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    _registers_heif()
    Pillow.init()
    known = [name for name in _FORMATS if name in Pillow.OPEN]
    return tuple(name for name in known if name != "AVIF" or features.check("avif"))


@functools.cache
def _registers_heif() -> bool:
    """Whether pillow-heif is installed. It is not a requirement: its codec has patents and its own licence."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except (ImportError, AttributeError, OSError):
        return False
    return True


def _unknown(content: bytes) -> str:
    """Why Pillow does not recognise the content as an image, judging by the first bytes."""
    for kind, name, start, advice in (
        ("heif", "a HEIC", _HEIF, HEIF_ADVICE),
        ("avif", "an AVIF", _AVIF, AVIF_ADVICE),
    ):
        if start.match(content):
            return (
                f"the file is {name} photo, but damaged"
                if codecs()[kind]
                else f"the file is {name} photo; {advice}"
            )
    return next(
        (f"the file {text}" for start, text in _KINDS if start.match(content)),
        "no picture, or of a kind that is not read (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF and HEIC are)",
    )


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise InputError(
            f"{width}x{height} pixels; at most {MAX_PIXELS // 10**6} million in all and {MAX_SIDE} on a side are decoded"
        )


def _rgb(picture: Pillow.Image) -> tuple[Image, str]:
    profile = picture.info.get("icc_profile") or b""
    opacity = None
    if picture.mode in _DEEP_GREY:
        picture = _eight_bits(picture)
    elif picture.mode == "F":
        raise InputError(
            "its pixels are floating point numbers of an unknown range; save it with 8 or 16 bits"
        )
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        opacity = picture.getchannel("A")
        picture = picture.convert("RGB")
    elif picture.mode not in ("RGB", "L", "CMYK", "LAB"):
        picture = picture.convert("RGB")
    picture, note = _srgb(picture, profile)
    if opacity is not None:
        picture = Pillow.composite(picture, Pillow.new("RGB", picture.size, "white"), opacity)
    return np.asarray(picture, dtype=np.uint8), note


def _eight_bits(picture: Pillow.Image) -> Pillow.Image:
    levels = np.asarray(picture).astype(np.float64)  # Pillow's own conversion clips at 255
    if levels.size and (levels.min() < 0 or levels.max() > _MAX_DEEP):
        raise InputError(
            f"its grey levels go from {levels.min():.0f} to {levels.max():.0f}; save it with 8 or 16 bits"
        )
    return Pillow.fromarray((levels / 257).round().astype(np.uint8))


def _srgb(picture: Pillow.Image, profile: bytes) -> tuple[Pillow.Image, str]:
    """Convert an image of mode RGB, L, CMYK or LAB to sRGB; also returns the note about an unusable profile."""
    if not profile and picture.mode != "LAB":
        return picture.convert("RGB"), ""
    transform, note = _transform(profile, picture.mode)
    if transform is not None:
        source, how = transform
        try:
            converted = ImageCms.applyTransform(
                picture if picture.mode == source else picture.convert(source), how
            )
        except (ImageCms.PyCMSError, ValueError):
            converted, note = None, SRGB_NOTE
        if converted is not None:
            return converted, note
    return picture.convert("RGB"), note


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> tuple[tuple[str, ImageCms.ImageCmsTransform] | None, str]:
    """The mode of a profile and the transform from there to sRGB. None if colours are sRGB or have to be assumed to be."""
    try:
        if profile:
            found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            source = _MODES_OF_SPACES.get(found.profile.xcolor_space.strip(), "")
        else:
            found, source = ImageCms.createProfile("LAB"), "LAB"  # type: ignore[assignment]
        # A grey image may have a profile for colours: it defines the lightness of the levels.
        if source != mode and (source, mode) != ("RGB", "L"):
            return None, SRGB_NOTE
        how = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), source, "RGB")
        if source == "RGB" and _is_close(how):
            return None, ""
        return (source, how), ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, SRGB_NOTE


def _is_close(how: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform changes nothing but rounding: most photos have an sRGB profile."""
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
    changed = ImageCms.applyTransform(Pillow.fromarray(grid), how)
    return bool(np.abs(np.asarray(changed).astype(int) - grid).max() <= _CLOSE)
