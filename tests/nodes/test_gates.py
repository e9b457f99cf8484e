"""IDAdapter's gated adapters: every site, every row, Eq. 7, and nothing at all where nothing can act."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes.idadapter_sampling import (
    KINDS,
    GatedCall,
    Made,
    Present,
    adapter,
    apply,
    assert_gates,
    person,
    positive,
    record_gates,
    sites,
)
from tests.nodes.sampling import SITE_COUNT, Conditioning, difference, draw, noise, prompt, sample, unet


def prompts(kind: str) -> tuple[Conditioning, Conditioning]:
    return prompt(kind, "positive"), prompt(kind, "negative")


def acted(calls: list[GatedCall]) -> list[bool]:
    """In which model calls the pack had a hand."""
    for call in calls:
        assert (call.own is not None) == bool(call.gates)
    return [bool(call.gates) for call in calls]


@contextmanager
def counted(made: Made) -> Iterator[Counter[str]]:
    """How often each layer of the adapter's gates runs, by its name."""
    runs: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: runs.update([name])

    modules = adapter(made).adapter.layers.gates.named_modules()
    hooks = [module.register_forward_hook(count(name)) for name, module in modules]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("photos", [4, 2, 1])
def test_positive_rows_get_equation_7_at_every_site(kind: str, photos: int) -> None:
    """Once per model call, the middle block included; negative rows stay as they are, bit for bit."""
    made = Made(kind)
    identity, (pos, neg) = person(made, photos=photos), prompts(kind)
    assert ("middle", 0, 0) in sites(kind)
    assert len(sites(kind)) == SITE_COUNT[kind]
    assert (identity.adapter_bias is None) == (photos == 4)
    model, calls = record_gates(apply(unet(kind), made, identity, 0.7))
    sample(model, pos, neg, steps=2)
    assert len(calls) == 2, "positive and negative did not share a call"
    for call in calls:
        assert sorted(assert_gates(made, call, [(pos, [positive(identity, 0.7)]), (neg, [])])) == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("photos", [4, 2])
def test_negative_rows_get_zeroed_features_where_the_adapter_says_so(kind: str, photos: int) -> None:
    made = Made(kind, unconditional="zeros")
    identity, (pos, neg) = person(made, photos=photos), prompts(kind)
    model, calls = record_gates(apply(unet(kind), made, identity))
    sample(model, pos, neg, steps=2)
    assert len(calls) == 2, "positive and negative did not share a call"
    for call in calls:
        pairs = [(pos, [positive(identity)]), (neg, [Present(identity.adapter_tokens_uncond)])]
        assert sorted(assert_gates(made, call, pairs)) == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_two_people_add_up(kind: str) -> None:
    made = Made(kind)
    one, two, (pos, neg) = person(made, 1), person(made, 2, photos=1), prompts(kind)
    model, calls = record_gates(apply(apply(unet(kind), made, one, 0.6), made, two, -0.3))
    sample(model, pos, neg, steps=1)
    people = [positive(one, 0.6), positive(two, -0.3)]
    assert [sorted(assert_gates(made, call, [(pos, people), (neg, [])])) for call in calls] == [[0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapter_leaves_no_trace(kind: str) -> None:
    """Gates and deltas of exactly 0, the start of a training: no patch, no changed weight, no further model, no work."""
    made = Made(kind, gate=0.0, delta=0.0)
    applied = apply(unet(kind), made, person(made))
    assert_no_trace(made, kind, applied)


def assert_no_trace(made: Made, kind: str, applied: Any) -> None:
    """Check that a MODEL samples exactly like the plain one, without any work or weights of the adapter."""
    with counted(made) as runs:
        model, calls = record_gates(applied)
        assert torch.equal(draw(model, kind), draw(unet(kind), kind))
    assert acted(calls) == [False, False]
    assert not runs
    assert applied.patches == {}
    assert applied.get_additional_models() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weight", "start", "end"), [(0.0, 0.0, 1.0), (1.0, 0.4, 0.4), (1.0, 0.0, 0.0)])
def test_switched_off_leaves_no_trace(kind: str, weight: float, start: float, end: float) -> None:
    made = Made(kind)
    assert_no_trace(made, kind, apply(unet(kind), made, person(made), weight, start, end))


@pytest.mark.parametrize("kind", KINDS)
def test_black_mask_leaves_no_trace(kind: str) -> None:
    made = Made(kind)
    assert_no_trace(made, kind, apply(unet(kind), made, person(made), mask=torch.zeros(1, 64, 64)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_acts_beside_one_that_does_not(kind: str) -> None:
    made = Made(kind)
    alone = apply(unet(kind), made, person(made, 1))
    first = apply(apply(unet(kind), made, person(made, 2), 0.0), made, person(made, 1))
    last = apply(alone, made, person(made, 2), 0.0)
    for model in (first, last):
        assert torch.equal(draw(model, kind), draw(alone, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_with_changed_weights(kind: str) -> None:
    """Then the K/V weights alone act: no middle patch, no gated layers in memory."""
    made = Made(kind, gate=0.0)
    applied = apply(unet(kind), made, person(made))
    model, calls = record_gates(applied)
    with counted(made) as runs:
        assert difference(draw(model, kind), draw(unet(kind), kind)) > 0.01
    assert acted(calls) == [False, False]
    assert not runs
    assert applied.get_additional_models() == []
    assert len(applied.patches) == 2 * SITE_COUNT[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_without_changed_weights(kind: str) -> None:
    made = Made(kind, delta=0.0)
    applied = apply(unet(kind), made, person(made))
    assert applied.patches == {}
    assert difference(draw(applied, kind), draw(unet(kind), kind)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_gate_is_skipped(kind: str) -> None:
    """The attention of site 3, the feed-forward of site 5 and both of site 7."""
    names = ("3.gate_attention", "5.gate_feed_forward", "7.gate_attention", "7.gate_feed_forward")
    made = Made(kind, closed=tuple(f"layers.gates.{name}" for name in names))
    identity, (pos, neg) = person(made), prompts(kind)
    model, calls = record_gates(apply(unet(kind), made, identity))
    with counted(made) as runs:
        sample(model, pos, neg, steps=2)
    for call in calls:
        assert_gates(made, call, [(pos, [positive(identity)]), (neg, [])], closed=[7])
    assert {name: runs[name] for name in ("3.to_qkv", "3.linear", "3.ff_in")} == {
        "3.to_qkv": 0,
        "3.linear": 0,
        "3.ff_in": 2,
    }
    assert {name: runs[name] for name in ("5.to_qkv", "5.linear", "5.ff_in")} == {
        "5.to_qkv": 3,
        "5.linear": 1,
        "5.ff_in": 0,
    }
    assert not any(name.startswith("7.") or name == "7" for name in runs)


@pytest.mark.parametrize("kind", KINDS)
def test_window_in_the_middle(kind: str) -> None:
    made = Made(kind, delta=0.0)
    sampling = unet(kind).get_model_object("model_sampling")
    model, calls = record_gates(apply(unet(kind), made, person(made), 1.0, 0.3, 0.7))
    draw(model, kind, steps=8)
    expected = [
        sampling.percent_to_sigma(0.7) < call.sigma <= sampling.percent_to_sigma(0.3) for call in calls
    ]
    assert acted(calls) == expected
    assert 0 < sum(expected) < 8


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_two_windows_that_meet_are_one(kind: str) -> None:
    """In the gates and in the K/V weights, which have no windows and are wanted once."""
    made = Made(kind)
    identity = person(made)
    first = apply(unet(kind), made, identity, 1.0, 0.0, 0.4)
    both = draw(apply(first, made, identity, 1.0, 0.4, 1.0), kind, steps=4)
    whole = draw(apply(unet(kind), made, identity), kind, steps=4)
    assert difference(both, whole) < 1e-5
    assert difference(draw(first, kind, steps=4), whole) > 1e-3


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_batch_of_latents(kind: str) -> None:
    made = Made(kind)
    identity, (pos, neg) = person(made, photos=3), prompts(kind)
    model, calls = record_gates(apply(unet(kind), made, identity))
    three = sample(model, pos, neg, latent_noise=noise(3))
    for call in calls:
        pairs = [(pos, [positive(identity)]), (neg, [])]
        assert sorted(assert_gates(made, call, pairs)) == [0, 0, 0, 1, 1, 1]
    one = sample(apply(unet(kind), made, identity), pos, neg, latent_noise=noise(3)[1:2])
    assert difference(three[1:2], one) < 1e-4


def test_given_tensors_are_left_alone_where_others_may_hold_them() -> None:
    """Another pack's middle patch keeps what it returned; ours may not write into it."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(x: Tensor, extra: dict[str, Any]) -> Tensor:
        out = x * 1.01
        kept.append((out, out.clone()))
        return out

    made = Made("sd15")
    base = unet("sd15").clone()
    base.set_model_patch(keep, "middle_patch")
    model, calls = record_gates(apply(base, made, person(made)))
    draw(model, "sd15")
    given = [site.before for call in calls for _, site in call.gates]
    assert len(kept) == len(given) == 2 * SITE_COUNT["sd15"]
    for (out, copy), before in zip(kept, given, strict=True):
        assert torch.equal(out, copy)
        assert torch.equal(before, copy), "ours did not come after theirs"
