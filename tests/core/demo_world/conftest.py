"""People and pictures that these tests share; each is drawn once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from idadapter_core.demo_world import Factors, Person, Pictures, render

SIZE = 64


def plain(seed: int = 0, **changes: object) -> Factors:
    """Factors of a photo from the front with a neutral face, but for changes."""
    drawn = Factors.sample(
        np.random.default_rng(seed),
        style="photo",
        background="studio",
        accessory="none",
        clothes="blue",
        expression="neutral",
        direction="ahead",
    )
    still = replace(drawn, yaw=0.0, pitch=0.0, roll=0.0, gaze=(0.0, 0.0), shift=(0.0, 0.0), zoom=1.0)
    return replace(still, **changes)  # type: ignore[arg-type]


def picture(person: Person, factors: Factors, size: int = SIZE, backend: str | None = "numpy") -> Pictures:
    return render([person], [factors], size, backend=backend)


@pytest.fixture(scope="session")
def person() -> Person:
    return Person.sample(0)
