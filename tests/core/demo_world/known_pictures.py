"""Pictures whose pixels are recorded. After a wanted change of the looks: python -m tests.core.demo_world.known_pictures"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from idadapter_core.demo_world import STYLES, Factors, Person, render

FILE = Path(__file__).with_suffix(".json")
SIZE, SQUARES = 64, 8


def draw() -> dict[str, np.ndarray]:
    """One picture (64, 64, 3) of another person in each style."""
    rng = np.random.default_rng(11)
    people = [Person.sample(20 + k) for k in range(len(STYLES))]
    factors = [Factors.sample(rng, style=style) for style in STYLES]
    return dict(zip(STYLES, render(people, factors, SIZE, backend="numpy").pixels, strict=True))


def packed() -> bytes:
    """The pixels of all pictures."""
    return np.stack(list(draw().values())).tobytes()


def coarse(pixels: np.ndarray) -> np.ndarray:
    """Means of 8 × 8 squares and of colours, rounded."""
    side = SIZE // SQUARES
    return np.rint(pixels.reshape(SQUARES, side, SQUARES, side, 3).mean((1, 3, 4))).astype(int)


def main() -> None:
    records = {
        name: {"sha256": hashlib.sha256(pixels.tobytes()).hexdigest(), "coarse": coarse(pixels).tolist()}
        for name, pixels in draw().items()
    }
    lines = (f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
