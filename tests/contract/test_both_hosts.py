"""Properties of every method in either host: an untrained or switched off adapter is no adapter, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.hosts import Act, Cast, base_of
from tests.contract.samples import MIX_MODES, Case, features, fresh, same_tokens, write_adapter

ACTS = 1e-3  # the least that counts as a difference, of predictions around 1


def test_a_fresh_adapter_changes_nothing(host: Any, case: Case, tmp_path: Path) -> None:
    adapter = host.load(write_adapter(fresh(case), tmp_path / "fresh.safetensors"))
    person = host.encode(adapter, features(1))
    assert host.draw(Act(adapter, person), steps=1).equals(base_of(host))


def test_strength_0_changes_nothing(host: Any, cast: Cast) -> None:
    assert host.draw(cast.act(strength=0.0), steps=1).equals(base_of(host))


def test_each_person_is_drawn_differently_and_more_so_with_more_strength(host: Any, cast: Cast) -> None:
    base, one, half = base_of(host), cast.drawn(1), cast.drawn(1, 0.5)
    assert one.first(base) > ACTS
    assert one.first(half) > ACTS
    assert half.first(base) < one.first(base)
    assert one.first(cast.drawn(2)) > ACTS


def test_negative_rows_know_nobody(host: Any, cast: Cast) -> None:
    """They may have changed weights, or tokens that stand for nobody, but none of a person's."""
    one, two = (cast.drawn(seed, said=True) for seed in (1, 2))
    assert torch.equal(one.negative, two.negative)
    assert torch.equal(one.contexts[0], base_of(host).contexts[0])
    assert one.first(two) > ACTS


def test_drawing_again_changes_nothing(host: Any, cast: Cast) -> None:
    """The same applied model, one applied anew, and the base model between them: nothing accumulates."""
    applied = host.apply(cast.act())
    first, again = (host.sample(applied, steps=1) for _ in range(2))
    host.release(applied)
    assert again.equals(first)
    assert host.draw(steps=1).equals(base_of(host))
    host.draw(cast.act(2, 0.7), said=cast.person(2), steps=1)
    assert host.draw(cast.act(), steps=1).equals(first)
    anew = Act(host.load(cast.file), cast.person())
    assert host.draw(anew, steps=1).equals(first), "the file, loaded anew"


def test_the_base_model_is_left_as_it_was(host: Any, cast: Cast) -> None:
    base, weights, traces = base_of(host), host.weights(), host.traces()
    host.draw(cast.act(), said=cast.person(), steps=1)
    assert host.draw(steps=1).equals(base)
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
    with pytest.raises(host.refusal, match=r"elsewhere\.safetensors was made for .* this .* is "):
        host.apply(Act(adapter, person))
    assert host.traces() == traces


def test_every_way_of_mixing_works_or_is_refused(host: Any, cast: Cast) -> None:
    """And a photo whose weight is 0 is as good as none."""
    photos, works = features(1, 3), []
    for mode in MIX_MODES:
        try:
            mixed = host.encode(cast.adapter, photos, mode, "1,1,0")
        except host.refusal as error:
            message = str(error)
            assert mode in message, message
            continue
        works.append(mode)
        without = host.encode(cast.adapter, photos.pick([0, 1]), mode, "1,1")
        assert same_tokens(mixed, without), mode
        assert not same_tokens(mixed, cast.person(1)), mode
    assert "auto" in works
