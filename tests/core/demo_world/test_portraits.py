"""Photos of a person as a user would bring them."""

from __future__ import annotations

import numpy as np
import pytest

from idadapter_core.demo_world.portraits import draw_portraits, reference_factors
from idadapter_core.errors import InputError

SIZE = 64


def test_the_same_number_always_gives_the_same_photos() -> None:
    person, photos = draw_portraits(5, 3, SIZE)
    again, same = draw_portraits(5, 3, SIZE)
    assert again == person
    assert photos.shape == (3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(photos, same)
    assert draw_portraits(6, 1, SIZE)[0] != person


def test_a_photo_does_not_depend_on_the_number_of_photos() -> None:
    np.testing.assert_array_equal(draw_portraits(5, 1, SIZE)[1], draw_portraits(5, 3, SIZE)[1][:1])


def test_no_photo_hides_the_eyes_behind_sunglasses() -> None:
    rng = np.random.default_rng(0)
    shown = [reference_factors(rng) for _ in range(200)]
    assert {factors.style for factors in shown} == {"photo"}
    accessories = {factors.accessory for factors in shown}
    assert "sunglasses" not in accessories
    assert "glasses" in accessories


def test_each_photo_is_announced_and_may_be_the_last() -> None:
    drawn: list[int] = []

    def stop() -> None:
        drawn.append(len(drawn))
        if len(drawn) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_portraits(5, 4, SIZE, stop)
    assert len(drawn) == 2


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(InputError, match="counted from 0, got -1"):
        draw_portraits(-1, 1, SIZE)
