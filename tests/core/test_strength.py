"""One dial for every method: nothing at 0, what an adapter is usually used with at 1, and more with more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from idadapter_core.adapter import load_adapter
from idadapter_core.demo_world.shipped import adapter_file, shipped
from idadapter_core.demo_world.world import RESCALED
from idadapter_core.errors import InputError
from idadapter_core.methods import METHODS
from idadapter_core.methods.uniid import UniIDConfig
from idadapter_core.schedule import RescaleSchedule
from idadapter_core.strength import STRONGEST, Dial


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_dial_from_nothing_to_more_than_usual(name: str) -> None:
    dial = METHODS[name].dial
    assert dial.factor(0.0) == 0
    assert dial.factor(1.0) == 1
    factors = [dial.factor(STRONGEST * step / 40) for step in range(41)]
    assert all(low < high for low, high in zip(factors, factors[1:], strict=False))


def test_between_two_points_it_is_straight() -> None:
    dial = Dial(((0.0, 0.0), (1.0, 1.0), (2.0, 5.0)))
    assert dial.factor(0.25) == 0.25
    assert dial.factor(1.5) == 3.0


@pytest.mark.parametrize("strength", [-0.1, STRONGEST + 0.1, math.nan, math.inf])
def test_a_strength_outside_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match="strength must be between 0 and 2"):
        METHODS["uniid"].dial.factor(strength)


def test_an_adapter_names_the_scales_that_it_is_usually_rescaled_by() -> None:
    adapter = load_adapter(shipped(adapter_file("uniid")))
    assert adapter.usual_rescale == RESCALED
    assert adapter.at_strength(1.0) == (1.0, RESCALED)
    weight, weaker = adapter.at_strength(0.5)
    assert weaker is not None
    assert weight == 1.0
    assert 0 < weaker.adapter_early == weaker.adapter_late < RESCALED.adapter_late
    assert (weaker.text_early, weaker.text_late) == (RESCALED.text_early, RESCALED.text_late)
    assert adapter.at_strength(0.0) == (0.0, None)


def test_an_adapter_that_names_none_has_the_published_ones() -> None:
    assert METHODS["uniid"].usual_rescale(UniIDConfig()) == RescaleSchedule()


def test_other_methods_have_a_weight() -> None:
    adapter = load_adapter(shipped(adapter_file("idadapter")))
    assert adapter.usual_rescale is None
    assert adapter.at_strength(1.25) == (1.25, None)


def test_scales_are_read_as_they_stand_in_a_file() -> None:
    assert RescaleSchedule.parse("1, .5") == RescaleSchedule(1.0, 0.5)
    assert RescaleSchedule.parse("1.8, 1.8, 1, 1") == RESCALED
    assert RescaleSchedule(1.0, 2.0).scaled(0.5) == replace(
        RescaleSchedule(), adapter_early=0.5, adapter_late=1.0
    )


@pytest.mark.parametrize("text", ["one", "1, 2, 3, 4, .1, 6", "nan", "1, 1, 1, 1, 2"])
def test_scales_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        RescaleSchedule.parse(text)
    with pytest.raises(InputError):
        UniIDConfig(rescale=text)
