"""Photos of a person as a user would bring them: any expression, direction and background, and no sunglasses."""

from __future__ import annotations

import numpy as np

from .factors import Factors
from .identity import Person, seed_of
from .render import Pictures, render

SEED_TAG = 1_216
LARGEST = 1024  # pixels along a side: beyond it, only time is added


def reference_factors(rng: np.random.Generator) -> Factors:
    """Draw the factors of a reference photo."""
    while True:
        factors = Factors.sample(rng, style="photo")
        if factors.accessory != "sunglasses":
            return factors


def draw_portraits(number: int, count: int, size: int = 512) -> tuple[Person, Pictures]:
    """Draw photos of a person whom no network was trained on.

    Args:
        number: of the person in the group `test`. The same number always gives the same person and photos.
        count: of photos. A photo does not depend on the number of photos.
        size: pixels along a side. At 128, as the networks were trained, face packages report a small face.
    """
    person = Person.sample(seed_of("test", number))
    rng = np.random.default_rng([SEED_TAG, number])
    return person, render([person] * count, [reference_factors(rng) for _ in range(count)], size)
