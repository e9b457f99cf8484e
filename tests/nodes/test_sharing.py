"""Nothing shared is mutated: the upstream MODEL stays what it was, and nothing accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.nodes.sampling import KINDS, adapter, apply, difference, draw, person, rescale, unet


def shape_of(options: Any) -> Any:
    """Containers by content and everything else by identity: what may not change in model options."""
    if isinstance(options, dict):
        return {key: shape_of(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return [shape_of(value) for value in options]
    return id(options)


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_model_stays_the_same(kind: str) -> None:
    base = unet(kind)
    plain, options, wrappers = draw(base, kind), shape_of(base.model_options), shape_of(base.wrappers)
    first = apply(base, kind, person(kind, 1))
    one, first_options = draw(first, kind), shape_of(first.model_options)
    second = rescale(apply(first, kind, person(kind, 2)), adapter_early=0.7)
    two = draw(second, kind)
    assert difference(one, plain) > 0.01
    assert difference(two, one) > 0.01
    assert torch.equal(draw(first, kind), one)
    assert torch.equal(draw(base, kind), plain)
    assert shape_of(first.model_options) == first_options
    assert shape_of(base.model_options) == options
    assert shape_of(base.wrappers) == wrappers


def test_running_a_node_again_changes_nothing() -> None:
    base, identity = unet("sdxl"), person("sdxl")
    first = draw(apply(base, "sdxl", identity), "sdxl")
    for _ in range(2):
        assert torch.equal(draw(apply(base, "sdxl", identity), "sdxl"), first)


def test_branches_do_not_meet() -> None:
    base = apply(unet("sdxl"), "sdxl", person("sdxl", 1), 0.5)
    branches = [apply(base, "sdxl", person("sdxl", seed)) for seed in (2, 3)]
    alone = [draw(apply(base, "sdxl", person("sdxl", seed)), "sdxl") for seed in (2, 3)]
    assert difference(alone[0], alone[1]) > 0.01
    for _ in range(2):
        for branch, expected in zip(branches, alone, strict=True):
            assert torch.equal(draw(branch, "sdxl"), expected)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_half_twice_is_the_whole_once(kind: str) -> None:
    identity = person(kind)
    whole = draw(apply(unet(kind), kind, identity, 1.0), kind)
    twice = draw(apply(apply(unet(kind), kind, identity, 0.5), kind, identity, 0.5), kind)
    half = draw(apply(unet(kind), kind, identity, 0.5), kind)
    assert difference(twice, whole) < 1e-4
    assert difference(half, whole) > 0.01


def test_weight_changed_and_back() -> None:
    identity = person("sd15")
    results = [draw(apply(unet("sd15"), "sd15", identity, weight), "sd15") for weight in (0.8, 0.3, 0.8)]
    assert difference(results[0], results[1]) > 0.01
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("copied", [lambda m: m.clone(), lambda m: m.clone().clone()])
def test_clone_acts_the_same(copied: Callable[[Any], Any]) -> None:
    model = rescale(apply(unet("sd15"), "sd15", person("sd15")))
    assert torch.equal(draw(copied(model), "sd15"), draw(model, "sd15"))


def test_deep_copy_of_model_options_copies_no_weights() -> None:
    """As older ComfyUI does at each clone."""
    from ComfyUI_IDAdapter.nodes.host.plan import KEY

    identity, mask = person("sdxl"), torch.ones(1, 8, 8)
    model = rescale(apply(unet("sdxl"), "sdxl", identity, mask=mask))
    before = draw(model, "sdxl")
    clone = model.clone()
    clone.model_options = copy.deepcopy(model.model_options)
    application = clone.model_options["transformer_options"][KEY].applications[0]
    assert application.adapter is adapter("sdxl").adapter
    assert application.identity is identity
    assert torch.equal(draw(clone, "sdxl"), before)
