"""Properties of every method in either host: an untrained or switched off adapter is no adapter, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.hosts import Act, Cast, Drawn, base_of
from tests.contract.samples import Case, features, fresh, write_adapter

ACTS = 1e-3  # the least that counts as a difference, of predictions around 1


def apart(one: Drawn, other: Drawn) -> float:
    """The largest difference of positive rows in the first step, where the latents are still the same."""
    return float((one.positive[0] - other.positive[0]).abs().max())


def test_a_fresh_adapter_changes_nothing(host: Any, case: Case, tmp_path: Path) -> None:
    adapter = host.load(write_adapter(fresh(case), tmp_path / "fresh.safetensors"))
    person = host.encode(adapter, features(1))
    assert host.draw(Act(adapter, person)).equals(base_of(host))


def test_strength_0_changes_nothing(host: Any, cast: Cast) -> None:
    assert host.draw(cast.act(strength=0.0)).equals(base_of(host))


def test_each_person_is_drawn_differently_and_more_so_with_more_strength(host: Any, cast: Cast) -> None:
    base, one, half = (host.draw(*acts) for acts in ([], [cast.act(1)], [cast.act(1, 0.5)]))
    assert apart(one, base) > ACTS
    assert apart(one, half) > ACTS
    assert apart(half, base) < apart(one, base)
    assert apart(one, host.draw(cast.act(2))) > ACTS


def test_negative_rows_know_nobody(host: Any, cast: Cast) -> None:
    """They may have changed weights, or tokens that stand for nobody, but none of a person's."""
    one, two = (host.draw(cast.act(seed), said=cast.person(seed)) for seed in (1, 2))
    assert torch.equal(one.negative[0], two.negative[0])
    assert torch.equal(one.contexts[0], base_of(host).contexts[0])
    assert apart(one, two) > ACTS


def test_drawing_again_changes_nothing(host: Any, cast: Cast) -> None:
    """The same applied model, one applied anew, and the base model between them: nothing accumulates."""
    base = base_of(host)
    applied = host.apply(cast.act())
    first, again = host.sample(applied), host.sample(applied)
    host.release(applied)
    assert again.equals(first)
    assert host.draw().equals(base)
    assert host.draw(cast.act()).equals(first)
    host.draw(cast.act(2, 0.7), said=cast.person(2))
    assert host.draw(cast.act()).equals(first)
    assert host.draw(Act(host.load(cast.file), cast.person())).equals(first), "the file, loaded anew"


def test_the_base_model_is_left_as_it_was(host: Any, cast: Cast) -> None:
    base, weights, traces = host.draw(), host.weights(), host.traces()
    host.draw(cast.act(), said=cast.person())
    assert host.draw().equals(base)
    assert host.traces() == traces
    after = host.weights()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_an_adapter_of_another_family_is_refused(host: Any, case: Case, tmp_path: Path) -> None:
    """With both named, and before anything is drawn."""
    family = "sd15" if case.family == "sdxl" else "sdxl"
    file = write_adapter(fresh(Case(case.method, family)), tmp_path / "elsewhere.safetensors")
    adapter, traces = host.load(file), host.traces()
    person = host.encode(adapter, features(1))
    with pytest.raises(host.refusal, match=r"elsewhere\.safetensors was made for .*, this .* is "):
        host.apply(Act(adapter, person))
    assert host.traces() == traces


@pytest.mark.parametrize("mode", ["auto", "learned", "concatenate", "mean"])
def test_every_way_of_mixing_works_or_is_refused(mode: str, host: Any, cast: Cast) -> None:
    """And a photo whose weight is 0 is as good as none."""
    three = features(1, 3)
    try:
        mixed = host.encode(cast.adapter, three, mode, "1,1,0")
    except host.refusal as error:
        assert mode in str(error)
        assert mode != "auto"
        return
    without = host.encode(cast.adapter, three.pick([0, 1]), mode, "1,1")
    assert host.draw(Act(cast.adapter, mixed), steps=1).equals(host.draw(Act(cast.adapter, without), steps=1))
    assert apart(host.draw(Act(cast.adapter, mixed), steps=1), host.draw(cast.act(), steps=1)) > ACTS
