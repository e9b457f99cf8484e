"""IDAdapter applied several times: what adds up, what stays apart, and that nothing shared is mutated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes.idadapter_sampling import (
    KINDS,
    Made,
    adapter,
    adapter_file,
    apply,
    assert_gates,
    equation_7,
    person,
    positive,
    record_gates,
)
from tests.nodes.sampling import attach, difference, draw, node, prompt, sample, unet
from tests.nodes.test_sharing import shape_of


@pytest.mark.parametrize("kind", KINDS)
def test_half_twice_is_the_whole_once(kind: str) -> None:
    """Gates and K/V weights: the second half sees what the whole sees, not what the first half made of it."""
    made = Made(kind)
    identity = person(made)
    whole = draw(apply(unet(kind), made, identity), kind)
    half = apply(unet(kind), made, identity, 0.5)
    assert difference(draw(apply(half, made, identity, 0.5), kind), whole) < 1e-4
    assert difference(draw(half, kind), whole) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_half_twice_through_an_adapter_loaded_twice(kind: str) -> None:
    """Two Load ID Adapter nodes with one file, or one that ran again: the same adapter."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    made = Made(kind)
    identity, again = person(made), load(adapter_file(made), None)
    assert again.adapter is not adapter(made).adapter
    first = apply(unet(kind), made, identity, 0.5)
    twice = node("IDAdapterApply", first, again, identity, 0.5, 0.0, 1.0, None)
    assert difference(draw(twice, kind), draw(apply(unet(kind), made, identity), kind)) < 1e-4
    assert len(twice.get_additional_models()) == 1, "the same layers would be loaded twice"


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_two_people_does_not_matter(kind: str) -> None:
    made = Made(kind)
    one, two = person(made, 1), person(made, 2, photos=2)
    first = draw(apply(apply(unet(kind), made, one, 0.6), made, two, 0.9), kind)
    last = draw(apply(apply(unet(kind), made, two, 0.9), made, one, 0.6), kind)
    assert difference(first, last) < 1e-4
    assert difference(first, draw(apply(unet(kind), made, one, 0.6), kind)) > 0.01
    assert difference(first, draw(apply(unet(kind), made, two, 0.9), kind)) > 0.01


def two_adapters(kind: str) -> tuple[Made, Made]:
    return Made(kind), Made(kind, seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_stand_side_by_side(kind: str) -> None:
    """Each adds what it would add alone: none sees the other's part."""
    one, two = two_adapters(kind)
    me, you = person(one), person(two, photos=2)
    pos, neg = prompt(kind, "positive"), prompt(kind, "negative")
    model, calls = record_gates(apply(apply(unet(kind), one, me, 0.7), two, you, 0.4))
    sample(model, pos, neg, cfg=1.0, steps=1)
    (call,) = calls
    assert len(call.gates) == len(call.by_block)
    for block, site in call.gates:
        y = site.before[0]
        added = equation_7(one, block, y, [positive(me, 0.7)]) + equation_7(
            two, block, y, [positive(you, 0.4)]
        )
        torch.testing.assert_close(site.after[0].double(), added - y, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_two_adapters_does_not_matter(kind: str) -> None:
    one, two = two_adapters(kind)
    first = apply(apply(unet(kind), one, person(one), 0.7), two, person(two), 0.4)
    last = apply(apply(unet(kind), two, person(two), 0.4), one, person(one), 0.7)
    assert difference(draw(first, kind), draw(last, kind)) < 1e-4
    assert difference(draw(first, kind), draw(apply(unet(kind), one, person(one), 0.7), kind)) > 0.01
    assert len(first.get_additional_models()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_closed_gates_beside_one_with_open_ones(kind: str) -> None:
    """Bit for bit as if it were not there."""
    made, closed = Made(kind), Made(kind, seed=3, gate=0.0, delta=0.0)
    alone = apply(unet(kind), made, person(made))
    for both in (
        apply(alone, closed, person(closed)),
        apply(apply(unet(kind), closed, person(closed)), made, person(made)),
    ):
        assert torch.equal(draw(both, kind), draw(alone, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_model_stays_the_same(kind: str) -> None:
    made, base = Made(kind), unet(kind)
    plain = draw(base, kind)
    before = [shape_of(part) for part in parts(base)]
    weights = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    first = apply(base, made, person(made, 1))
    one, first_before = draw(first, kind), [shape_of(part) for part in parts(first)]
    second = apply(first, Made(kind, seed=3), person(Made(kind, seed=3)))
    two = draw(second, kind)
    assert difference(one, plain) > 0.01
    assert difference(two, one) > 0.01
    assert torch.equal(draw(first, kind), one)
    assert torch.equal(draw(base, kind), plain)
    assert [shape_of(part) for part in parts(first)] == first_before
    assert [shape_of(part) for part in parts(base)] == before
    after = base.model.state_dict()
    for key, tensor in weights.items():
        assert torch.equal(after[key], tensor), key


def parts(model: Any) -> tuple[Any, ...]:
    """What a node could have changed of a MODEL."""
    return model.model_options, model.wrappers, model.patches, model.additional_models, model.object_patches


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_adapter_stays_the_same(kind: str) -> None:
    made = Made(kind)
    loaded = adapter(made)
    before = {key: tensor.clone() for key, tensor in loaded.adapter.state_dict().items()}
    identity = person(made)
    tokens = identity.adapter_tokens.clone()
    for weight in (0.7, -0.4):
        draw(apply(apply(unet(kind), made, identity, weight), made, person(made, 2), weight), kind)
    after = loaded.adapter.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert torch.equal(identity.adapter_tokens, tokens)
    assert loaded.gates.patches == {}
    assert loaded.gates.additional_models == {}


def test_running_a_node_again_changes_nothing() -> None:
    made = Made("sdxl")
    first = draw(apply(unet("sdxl"), made, person(made)), "sdxl")
    for _ in range(2):
        assert torch.equal(draw(apply(unet("sdxl"), made, person(made)), "sdxl"), first)


def test_branches_do_not_meet() -> None:
    kind, made = "sdxl", Made("sdxl")
    base = apply(unet(kind), made, person(made, 1), 0.5)
    branches = [apply(base, made, person(made, seed), 0.8) for seed in (2, 3)]
    alone = [draw(apply(base, made, person(made, seed), 0.8), kind) for seed in (2, 3)]
    assert difference(alone[0], alone[1]) > 0.01
    for _ in range(2):
        for branch, expected in zip(branches, alone, strict=True):
            assert torch.equal(draw(branch, kind), expected)


def test_weight_changed_and_back() -> None:
    made = Made("sd15")
    results = [draw(apply(unet("sd15"), made, person(made), weight), "sd15") for weight in (0.8, 0.3, 0.8)]
    assert difference(results[0], results[1]) > 0.01
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("copied", [lambda m: m.clone(), lambda m: m.clone().clone()])
def test_clone_acts_the_same(copied: Callable[[Any], Any]) -> None:
    made = Made("sd15")
    model = apply(unet("sd15"), made, person(made))
    assert torch.equal(draw(copied(model), "sd15"), draw(model, "sd15"))


def test_deep_copy_of_model_options_copies_no_weights() -> None:
    """As older ComfyUI does at each clone."""
    from ComfyUI_IDAdapter.nodes.host.plan import KEY

    made = Made("sd15")
    mask: Tensor = torch.ones(1, 8, 8)
    model = apply(unet("sd15"), made, person(made), mask=mask)
    before = draw(model, "sd15")
    clone = model.clone()
    clone.model_options = copy.deepcopy(model.model_options)
    application = clone.model_options["transformer_options"][KEY].applications[0]
    assert application.adapter is adapter(made).adapter
    assert application.identity is person(made)
    assert torch.equal(draw(clone, "sd15"), before)


def test_conditionings_of_the_user_are_left_alone() -> None:
    made = Made("sd15")
    pos, neg = prompt("sd15", "positive"), prompt("sd15", "negative")
    before = [dict(options) for _, options in (*pos, *neg)]
    states = [states.clone() for states, _ in (*pos, *neg)]
    sample(apply(unet("sd15"), made, person(made)), pos, neg)
    assert [options for _, options in (*pos, *neg)] == before
    assert all(torch.equal(now, old) for (now, _), old in zip((*pos, *neg), states, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_two_people_of_one_adapter_in_one_row_and_one_in_another(kind: str) -> None:
    """Attached to prompts: each row has its own people."""
    made = Made(kind)
    one, two, three = (person(made, seed, photos) for seed, photos in ((1, 4), (2, 2), (3, 1)))
    pos, other, neg = (prompt(kind, name) for name in ("positive", "other", "negative"))
    model, calls = record_gates(apply(apply(unet(kind), made, one, 0.6), made, two, 0.9))
    sample(model, [*pos, *attach(other, three)], neg, steps=1)
    pairs = [
        (pos, [positive(one, 0.6), positive(two, 0.9)]),
        (other, [positive(three, 0.6)]),
        (neg, []),
    ]
    assert sorted(row for call in calls for row in assert_gates(made, call, pairs)) == [0, 1, 2]
