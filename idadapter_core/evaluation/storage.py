"""What an evaluation keeps on the disk: files that are whole or not there, under names that say what they depend on."""

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
_UNREADABLE = (OSError, ValueError, SyntaxError, KeyError)  # what Pillow and NumPy say of damaged files


def key_of(facts: Mapping[str, Any]) -> str:
    """A name for plain values: 24 hex digits, others as soon as one value differs."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_picture(path: Path) -> Image:
    """A picture that an evaluation wrote (H, W, 3), RGB uint8. Raises what `_UNREADABLE` lists."""
    with _open(path) as image:
        return np.asarray(image.convert("RGB"))


def _open(path: Path) -> PILImage.Image:
    return PILImage.open(
        path, formats=("PNG",)
    )  # no other format is written, and Pillow has programs start for some


@dataclass(frozen=True)
class Picture:
    """A generated picture on the disk."""

    key: str
    path: Path
    seconds: float  # that it took to generate
    is_new: bool  # generated in this process

    def read(self) -> Image:
        """(H, W, 3), RGB uint8."""
        return read_picture(self.path)


class Pictures:
    """Generated pictures of a folder, each under the hash of all that it depends on. A picture is generated once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, recipe: Mapping[str, Any], generate: Callable[[], Image], clock: Callable[[], float]
    ) -> Picture:
        """The picture of a recipe; `generate` gives it (H, W, 3), RGB uint8, where there is no whole file of it.

        Args:
            recipe: plain values, all that the picture depends on. They are written into the PNG as text, under "recipe".
            clock: seconds, to tell how long it took.
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
    """How long the picture took, as its file says; None where there is no whole file."""
    if not path.is_file():
        return None
    try:
        with _open(path) as image:
            image.load()  # a cut file shows only when it is read
            return float(image.info["seconds"])
    except _UNREADABLE as error:
        log.warning("%s is damaged (%s) and is generated again", path, error)
        return None


class Arrays:
    """Small sets of arrays, what was seen in a picture, under the hash of all that they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, key: str, make: Callable[[], Mapping[str, np.ndarray[Any, Any]]]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of a key; `make` gives them where there is no whole file of them."""
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
