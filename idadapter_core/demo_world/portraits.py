"""Photos of a person as a user would bring them: any expression, direction and background, and no sunglasses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .factors import Factors
from .identity import Person, seed_of
from .render import render

SEED_TAG = 1_216


def reference_factors(rng: np.random.Generator) -> Factors:
    """Draw the factors of a reference photo."""
    while True:
        factors = Factors.sample(rng, style="photo")
        if factors.accessory != "sunglasses":
            return factors


def draw_portraits(
    number: int, count: int, size: int = 512, each: Callable[[], None] = lambda: None
) -> tuple[Person, npt.NDArray[np.uint8]]:
    """Draw photos (count, size, size, 3) of a person whom no network was trained on.

    Args:
        number: of the person in the group `test`. The same number always gives the same person and photos.
        count: of photos. A photo does not depend on the number of photos.
        size: pixels along a side. At 128, as the networks were trained, face packages report a small face.
        each: called after each photo; it may raise to stop.

    Raises:
        InputError: a negative number, or a size that the renderer does not draw.
    """
    person = Person.sample(seed_of("test", number))
    rng = np.random.default_rng([SEED_TAG, number])
    photos = []
    for _ in range(count):
        photos.append(render([person], [reference_factors(rng)], size).pixels)
        each()
    return person, np.concatenate(photos)
