"""Sample grids during training: the same people, prompts and seeds each time."""

from __future__ import annotations

import itertools
import logging
import math
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage, ImageDraw, ImageFont
from torch import Tensor

from ..adapter import Adapter
from ..data.people import People
from ..data.references import features_of
from ..errors import InputError
from ..faces.images import Image
from ..files import replacing
from ..stable_diffusion.pipeline import Pipeline, to_levels
from .bundle import Bundle
from .config import RunConfig
from .parts import Parts

FOLDER = "samples"
SEED = 0
BASE = "the base model alone"
_GAP = 4  # pixels
_LINES = 4  # of a prompt above its column
_MORE = "..."

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
log = logging.getLogger(__name__)


def sample_grid(
    bundle: Bundle,
    adapter: Adapter,
    parts: Parts,
    config: RunConfig,
    folder: Path,
    step: int,
    *,
    poll: Callable[[], None] = lambda: None,
    wait: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> Image:
    """Draw `samples/step-N.png` and return the image (H, W, 3), RGB uint8.

    One row per person: the face of a reference photo, then an image per prompt. The last row is the base model alone.

    Args:
        poll: called before each step of the sampler; an exception from it ends the drawing.
        wait: calls the functions that read photos and write the image, and returns their results.
    """
    rows = parts.test_rows or parts.train_rows
    chosen = list(itertools.islice(People(rows), config.output.sample_people))
    pipeline = Pipeline(parts.base, adapter, bundle.injected, poll)
    size = config.data.resolution
    lines: list[tuple[str, list[Image]]] = []
    device = next(bundle.encoder.parameters()).device
    settings: dict[str, Any] = {
        "seed": SEED,
        "steps": config.output.sample_steps,
        "cfg": config.output.sample_cfg,
    }
    for person in chosen:
        photos = person[: config.data.references]
        features = features_of(parts.index, photos, parts.networks, parts.recognizer_digest, device, wait)
        identity = adapter.encode(features)
        assert features.crops is not None
        line = [_fit(to_levels((features.crops[0] + 1) / 2), size)]
        for prompt in config.output.prompts:
            picture = pipeline.generate(prompt, identity=identity, width=size, height=size, **settings)
            line.append(_levels(picture, config))
        lines.append((photos[0].identity or photos[0].source, line))
    blank = np.full((size, size, 3), 255, np.uint8)
    alone = [
        _levels(pipeline.generate(prompt, width=size, height=size, **settings), config)
        for prompt in config.output.prompts
    ]
    grid = _grid([*lines, (BASE, [blank, *alone])], ("reference", *config.output.prompts))
    path = folder / FOLDER / f"step-{step:08d}.png"
    wait(lambda: _write(path, grid))
    return grid


def _write(path: Path, grid: Image) -> None:
    with replacing(path) as temporary:
        PILImage.fromarray(grid).save(temporary, format="PNG")


def _levels(picture: Tensor, config: RunConfig) -> Image:
    """Convert an image (3, H, W) in 0..1 to (H, W, 3) uint8. Non-finite values become white: they must not end the training."""
    try:
        return to_levels(picture, config.train.mixed_precision)
    except InputError as error:
        log.warning("%s; it is white in the grid", error)
        return np.full((*picture.shape[1:], 3), 255, np.uint8)


def _fit(image: Image, size: int) -> Image:
    return np.asarray(PILImage.fromarray(image).resize((size, size), PILImage.Resampling.LANCZOS))


def _grid(lines: Sequence[tuple[str, Sequence[Image]]], titles: Sequence[str]) -> Image:
    """Rows of images, each under its name; each column under its title."""
    size = lines[0][1][0].shape[0]
    step = size + _GAP
    width = len(titles) * step - _GAP
    font = ImageFont.load_default(max(size // 24, 10))
    line_height = math.ceil(font.getbbox("Ajp")[3]) + 2
    wrapped = [_wrapped(_drawable(title), font, size) for title in titles]
    head = max(map(len, wrapped)) * line_height + _GAP
    strip = line_height + _GAP
    sheet = PILImage.new("RGB", (width, head + len(lines) * (strip + step) - _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, words in enumerate(wrapped):
        for number, text in enumerate(words):
            pen.text((column * step, number * line_height), text, "black", font)
    for row, (name, pictures) in enumerate(lines):
        top = head + row * (strip + step)
        pen.text((0, top), _cut(_drawable(name), font, width), "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(PILImage.fromarray(picture), (column * step, top + strip))
    return np.asarray(sheet)


def _drawable(text: str) -> str:
    """Reduce a text to ASCII for Pillow's built-in font: drop accents, replace other letters by their numbers."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return plain.encode("ascii", "backslashreplace").decode()


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Wrap a text to a width in pixels; the rest is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} {_MORE}"]
    return [_cut(line, font, width) for line in lines]


def _cut(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    lengths = [length for length in range(len(text)) if font.getlength(text[:length] + _MORE) <= width]
    return text[: max(lengths, default=0)] + _MORE
