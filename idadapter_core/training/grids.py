"""Pictures of a run as it goes on: the same people, prompts and seeds at each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from ..checkpoint import Adapter
from ..data.people import by_person
from ..faces.images import Image
from ..files import replacing
from .bundle import Bundle
from .config import RunConfig
from .parts import Parts
from .pipeline import Pipeline, features_of, to_levels

FOLDER = "samples"
SEED = 0
_GAP = 4  # pixels


def sample_grid(
    bundle: Bundle, adapter: Adapter, parts: Parts, config: RunConfig, folder: Path, step: int
) -> Image:
    """Draw and write `samples/step-N.png`; the picture (H, W, 3), RGB uint8.

    A row for each person: a reference photo's face, then a picture for each prompt. The last row is the base model alone.
    """
    rows = parts.test_rows or parts.train_rows
    chosen = list(by_person(rows).values())[: config.output.sample_people]
    pipeline = Pipeline(parts.base, adapter, bundle.injected)
    size = config.data.resolution
    lines: list[list[Image]] = []
    device = next(bundle.encoder.parameters()).device
    settings: dict[str, Any] = {
        "seed": SEED,
        "steps": config.output.sample_steps,
        "cfg": config.output.sample_cfg,
    }
    for person in chosen:
        photos = person[: config.data.references]
        features = features_of(parts.index, photos, parts.networks, parts.recognizer_digest, device)
        identity = adapter.encode(features)
        assert features.crops is not None
        line = [_fit(to_levels((features.crops[0] + 1) / 2), size)]
        for prompt in config.output.prompts:
            picture = pipeline.generate(prompt, identity=identity, width=size, height=size, **settings)
            line.append(to_levels(picture))
        lines.append(line)
    blank = np.full((size, size, 3), 255, np.uint8)
    alone = [
        to_levels(pipeline.generate(prompt, width=size, height=size, **settings))
        for prompt in config.output.prompts
    ]
    grid = _grid([*lines, [blank, *alone]])
    path = folder / FOLDER / f"step-{step:08d}.png"
    with replacing(path) as temporary:
        PILImage.fromarray(grid).save(temporary, format="PNG")
    return grid


def _fit(image: Image, size: int) -> Image:
    return np.asarray(PILImage.fromarray(image).resize((size, size), PILImage.Resampling.LANCZOS))


def _grid(lines: list[list[Image]]) -> Image:
    size = lines[0][0].shape[0]
    step = size + _GAP
    grid = np.full((len(lines) * step - _GAP, len(lines[0]) * step - _GAP, 3), 255, np.uint8)
    for row, line in enumerate(lines):
        for column, image in enumerate(line):
            grid[row * step : row * step + size, column * step : column * step + size] = image
    return grid
