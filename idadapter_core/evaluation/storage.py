"""Stored results of an evaluation: files that are complete or absent, named by a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from ..faces.images import Image
from ..files import write_file

log = logging.getLogger(__name__)
_UNREADABLE = (OSError, ValueError, SyntaxError, KeyError)  # errors of Pillow and NumPy for damaged files


def key_of(facts: Mapping[str, Any]) -> str:
    """Hash plain values to 24 hex digits."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_picture(path: Path) -> Image:
    """Read an image that an evaluation wrote (H, W, 3), RGB uint8. Raises the errors in `_UNREADABLE`."""
    with _open(path) as image:
        return np.asarray(image.convert("RGB"))


def _open(path: Path) -> PILImage.Image:
    # No other format is written, and Pillow runs external programs for some.
    return PILImage.open(path, formats=("PNG",))


@dataclass(frozen=True)
class Picture:
    """A generated image on disk."""

    key: str
    path: Path
    seconds: float  # generation time
    is_new: bool  # generated in this process

    def read(self) -> Image:
        """Read the image (H, W, 3), RGB uint8."""
        return read_picture(self.path)


class Pictures:
    """A folder of generated images, each named by the hash of its recipe. An image is generated once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, recipe: Mapping[str, Any], generate: Callable[[], Image], clock: Callable[[], float]
    ) -> Picture:
        """Return the image of a recipe, generating it if there is no intact file.

        Args:
            recipe: plain values, all that the image depends on. Stored in the PNG as text, under "recipe".
            generate: makes the image (H, W, 3), RGB uint8.
            clock: returns the time in seconds, to measure the generation time.
        """
        key = key_of(recipe)
        path = self.folder / key[:2] / f"{key}.png"
        seconds = _seconds_of(path)
        if seconds is not None:
            return Picture(key, path, seconds, is_new=False)
        start = clock()
        image = generate()
        seconds = clock() - start
        facts = PngInfo()
        facts.add_itxt("recipe", json.dumps(recipe, sort_keys=True, ensure_ascii=False))
        facts.add_text("seconds", f"{seconds:.3f}")
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, "PNG", pnginfo=facts)
        write_file(path, buffer.getvalue())
        return Picture(key, path, round(seconds, 3), is_new=True)


def _seconds_of(path: Path) -> float | None:
    """Generation time stored in the file; None if there is no intact file."""
    if not path.is_file():
        return None
    try:
        with _open(path) as image:
            image.load()  # a truncated file is only noticed when read
            return float(image.info["seconds"])
    except _UNREADABLE as error:
        log.warning("%s is damaged (%s) and is generated again", path, error)
        return None


class Arrays:
    """A folder of small sets of arrays (observations of images), each named by the hash of everything it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, key: str, make: Callable[[], Mapping[str, np.ndarray[Any, Any]]]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of a key, calling `make` if there is no intact file."""
        path = self.folder / key[:2] / f"{key}.npz"
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as file:
                    return {name: file[name] for name in file.files}
            except (*_UNREADABLE, EOFError) as error:
                log.warning("%s is damaged (%s) and is made again", path, error)
        arrays = dict(make())
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes the arrays for its own options
        write_file(path, buffer.getvalue())
        return arrays
