"""Normalized Identity Rescaling and gated adapters: left as trained unless asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.nodes.idadapter_sampling import (
    KINDS,
    Made,
    apply,
    assert_gates,
    at_work,
    person,
    positive,
    record_gates,
    sites,
)
from tests.nodes.sampling import difference, draw, noise, prompt, rescale, same_states, sample, unet
from tests.nodes.test_other_packs import other_node

KIND = "sd15"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["ID adapters", "every attention patch"])
def test_gates_are_left_alone(kind: str, scope: str) -> None:
    made = Made(kind)
    applied = apply(unet(kind), made, person(made), 0.7)
    rescaled = rescale(applied, scope=scope, adapter_early=0.2, adapter_late=3.0)
    assert torch.equal(draw(rescaled, kind), draw(applied, kind))


def test_gates_are_left_alone_beside_a_rescaled_patch_of_another_pack() -> None:
    made = Made(KIND)
    theirs, _ = other_node(unet(KIND), KIND)
    rescaled = rescale(
        apply(theirs, made, person(made), 0.7), scope="every attention patch", adapter_late=0.3
    )
    model, calls = record_gates(rescaled)
    pos, neg = prompt(KIND, "positive"), prompt(KIND, "negative")
    out = sample(model, pos, neg, steps=1)
    pairs = [(pos, [positive(person(made), 0.7)]), (neg, [])]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 1]]
    assert difference(out, sample(apply(theirs, made, person(made), 0.7), pos, neg, steps=1)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.5, -0.5])
def test_residual_has_the_length_that_the_schedule_says(kind: str, weight: float) -> None:
    """Strength times scale times the length of what self-attention added, for each row, whatever the gates."""
    made = Made(kind, gate=0.05)
    pos, neg = prompt(kind, "positive"), prompt(kind, "negative")
    applied = apply(unet(kind), made, person(made, photos=2), weight)
    model, calls = record_gates(rescale(applied, gated=True, adapter_early=0.25, adapter_late=1.5))
    sample(model, pos, neg, steps=2, latent_noise=noise(2))
    trained, trained_calls = record_gates(applied)
    sample(trained, pos, neg, steps=1, latent_noise=noise(2))
    for call, scale in zip(calls, (0.25, 1.5), strict=True):
        assert call.by_block.keys() == sites(kind).keys()
        for _, site in call.gates:
            ratio = (site.after - site.before).flatten(1).norm(dim=1) / site.self_attention.flatten(1).norm(
                dim=1
            )
            wanted = [scale * abs(weight) if same_states(row, pos) else 0.0 for row in call.context]
            assert sorted(wanted) == sorted(2 * [0.0, scale * abs(weight)])
            torch.testing.assert_close(ratio, torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    # In the direction in which it was trained: at the first site both runs are given the same tokens.
    (block, first), (_, as_trained) = calls[0].gates[0], trained_calls[0].gates[0]
    assert torch.equal(first.before, as_trained.before), block
    rows = [row for row, states in enumerate(calls[0].context) if same_states(states, pos)]
    for row in rows:
        added, usual = (site.after[row] - site.before[row] for site in (first, as_trained))
        cosine = torch.cosine_similarity(added.flatten(), usual.flatten(), dim=0)
        # The feed-forward sees the attention's part at full strength instead of at this one.
        assert cosine > 0.9


def test_unconditional_tokens_are_brought_to_the_same_length() -> None:
    made = Made(KIND, unconditional="zeros")
    model, calls = record_gates(rescale(apply(unet(KIND), made, person(made)), gated=True, adapter_late=0.6))
    draw(model, KIND, steps=1)
    for _, site in calls[0].gates:
        ratio = (site.after - site.before).flatten(1).norm(dim=1) / site.self_attention.flatten(1).norm(dim=1)
        torch.testing.assert_close(ratio, torch.full((2,), 0.6), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_stay_closed(kind: str) -> None:
    closed = ("layers.gates.7.gate_attention", "layers.gates.7.gate_feed_forward")
    made = Made(kind, closed=closed)
    model, calls = record_gates(rescale(apply(unet(kind), made, person(made)), gated=True))
    draw(model, kind, steps=1)
    for block, site in calls[0].gates:
        assert torch.equal(site.after, site.before) == (sites(kind)[block] == 7)
    fresh = Made(kind, gate=0.0, delta=0.0)
    assert torch.equal(
        draw(rescale(apply(unet(kind), fresh, person(fresh)), gated=True), kind), draw(unet(kind), kind)
    )


def test_scale_0_in_the_early_steps() -> None:
    made = Made(KIND, delta=0.0)
    model, calls = record_gates(rescale(apply(unet(KIND), made, person(made)), gated=True, adapter_early=0.0))
    draw(model, KIND, steps=4)
    assert [bool(call.gates) for call in calls] == [False, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_before_or_after(kind: str) -> None:
    made = Made(kind)

    def ours(model: Any) -> Any:
        return rescale(model, gated=True, adapter_early=0.4)

    before = draw(apply(ours(unet(kind)), made, person(made)), kind)
    after = draw(ours(apply(unet(kind), made, person(made))), kind)
    assert torch.equal(before, after)
    assert difference(after, draw(apply(unet(kind), made, person(made)), kind)) > 0.01


def test_two_people_are_measured_each() -> None:
    """Both against the same length, so the order does not matter."""
    made = Made(KIND)
    one, two = person(made, 1), person(made, 2)
    first = rescale(apply(apply(unet(KIND), made, one, 0.5), made, two, 0.8), gated=True)
    last = rescale(apply(apply(unet(KIND), made, two, 0.8), made, one, 0.5), gated=True)
    assert difference(draw(first, KIND), draw(last, KIND)) < 1e-4
    model, calls = record_gates(first)
    alone, alone_calls = record_gates(rescale(apply(unet(KIND), made, one, 0.5), gated=True))
    for some in (model, alone):
        draw(some, KIND, steps=1, cfg=1.0)
    (_, both), (_, single) = calls[0].gates[0], alone_calls[0].gates[0]
    rest = both.after - single.after
    length = single.self_attention.norm()
    torch.testing.assert_close((single.after - single.before).norm(), 0.5 * length, rtol=1e-3, atol=0)
    torch.testing.assert_close(rest.norm(), 0.8 * length, rtol=1e-3, atol=0)


def test_key_and_value_weights_follow_the_weight_alone() -> None:
    made = Made(KIND)
    applied = apply(unet(KIND), made, person(made), 0.7)
    left, right = at_work(applied), at_work(rescale(applied, gated=True, adapter_early=0.1, adapter_late=2.0))
    for key, weight in left.items():
        assert torch.equal(weight, right[key])


def test_another_packs_output_patch_counts() -> None:
    """The length is that of what reaches the image tokens, whoever changed it on the way and in any order of the nodes."""
    made = Made(KIND)

    def weaker(n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return n * 0.25

    def theirs(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn1_output_patch(weaker)
        return clone

    def ours(model: Any) -> Any:
        return rescale(apply(model, made, person(made)), gated=True, adapter_late=0.5)

    model, calls = record_gates(ours(theirs(unet(KIND))))
    before = draw(model, KIND, steps=1, cfg=1.0)
    for _, site in calls[0].gates:
        added, length = (site.after - site.before).norm(), site.self_attention.norm()
        torch.testing.assert_close(added, 0.5 * length, rtol=1e-3, atol=0)
    assert torch.equal(draw(theirs(ours(unet(KIND))), KIND, steps=1, cfg=1.0), before)


def test_limit_weakens_gated_layers_and_no_more() -> None:
    made = Made(KIND)

    def drawn(weight: float, **options: Any) -> torch.Tensor:
        return draw(rescale(apply(unet(KIND), made, person(made), weight), gated=True, **options), KIND)

    free = draw(apply(unet(KIND), made, person(made), 0.6), KIND)
    assert difference(drawn(0.6, mode="limit", adapter_early=50, adapter_late=50), free) < 1e-5
    # The K/V deltas follow the weight alone, so it stays the same here.
    low = {"adapter_early": 1e-3, "adapter_late": 1e-3}
    held, scaled = drawn(1.0, mode="limit", **low), drawn(1.0, **low)
    assert difference(held, scaled) < 1e-5
    assert difference(held, free) > 0.01
