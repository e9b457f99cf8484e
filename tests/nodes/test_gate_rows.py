"""Which rows get which identity through gated adapters, whoever arranges the rows: guiders, areas, batches, attached people."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.nodes.idadapter_sampling import (
    KINDS,
    Made,
    Present,
    apply,
    assert_gates,
    person,
    positive,
    record_gates,
)
from tests.nodes.sampling import (
    Conditioning,
    attach,
    difference,
    left_half,
    noise,
    prompt,
    run_guider,
    sample,
    unet,
)
from tests.nodes.test_regrouped_batches import tiled

KIND = "sd15"


def prompts(kind: str) -> tuple[Conditioning, Conditioning, Conditioning]:
    return prompt(kind, "positive"), prompt(kind, "negative"), prompt(kind, "other")


@pytest.mark.parametrize("kind", KINDS)
def test_cfg_1_runs_the_positive_rows_alone(kind: str) -> None:
    made, (pos, neg, _) = Made(kind), prompts(kind)
    model, calls = record_gates(apply(unet(kind), made, person(made)))
    sample(model, pos, neg, cfg=1.0)
    for call in calls:
        assert assert_gates(made, call, [(pos, [positive(person(made))])]) == [0]


@pytest.mark.parametrize("unconditional", ["skip", "zeros"])
@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg(style: str, unconditional: str) -> None:
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    made, (pos, neg, middle) = Made("sdxl", unconditional=unconditional), prompts("sdxl")
    identity = person(made)
    model, calls = record_gates(apply(unet("sdxl"), made, identity))
    run_guider(DualCFGGuider.execute(model, pos, middle, neg, 5.0, 3.0, style).result[0])
    none = [Present(identity.adapter_tokens_uncond)] if unconditional == "zeros" else []
    pairs = [(pos, [positive(identity)]), (neg, none), (middle, [positive(identity)])]
    assert len(calls) == 2
    for call in calls:
        assert sorted(assert_gates(made, call, pairs)) == [0, 1, 2]


def test_perp_neg() -> None:
    from comfy_extras.nodes_perpneg import PerpNegGuider

    made, (pos, neg, empty) = Made(KIND), prompts(KIND)
    model, calls = record_gates(apply(unet(KIND), made, person(made)))
    run_guider(PerpNegGuider.execute(model, pos, neg, empty, 5.0, 1.0).result[0])
    assert len(calls) == 2
    for call in calls:
        pairs = [(pos, [positive(person(made))]), (neg, []), (empty, [])]
        assert sorted(assert_gates(made, call, pairs)) == [0, 1, 2]


def test_self_attention_guidance_and_perturbed_attention() -> None:
    """The second of SAG's calls holds negative rows alone: nothing to do there, not even a patch."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    made, (pos, neg, _) = Made(KIND), prompts(KIND)
    model = apply(unet(KIND), made, person(made))
    model = PerturbedAttentionGuidance.execute(model, 3.0).result[0]
    model = SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0]
    model, calls = record_gates(model)
    out = sample(model, pos, neg, latent_noise=noise(height=16, width=16), steps=1)
    assert out.isfinite().all()
    pairs = [(pos, [positive(person(made))]), (neg, [])]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls[:2]] == [[0, 1], [0]]
    assert len(calls) == 3
    assert calls[2].gates == []
    assert calls[2].own is None


@pytest.mark.parametrize("unconditional", ["skip", "zeros"])
def test_split_halves(monkeypatch: pytest.MonkeyPatch, unconditional: str) -> None:
    kind = "sdxl"
    made, (pos, neg, _) = Made(kind, unconditional=unconditional), prompts(kind)
    identity = person(made)
    applied = apply(unet(kind), made, identity)
    together = sample(applied, pos, neg)
    model, calls = record_gates(applied)
    # A device on which only one row fits.
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: math.inf)
    assert difference(sample(model, pos, neg), together) < 1e-4
    none = [Present(identity.adapter_tokens_uncond)] if unconditional == "zeros" else []
    rows = [
        assert_gates(made, call, [(pos, [positive(identity)]), (neg, none)]) for call in calls if call.gates
    ]
    assert sorted(rows) == ([[0], [0], [1], [1]] if none else [[0], [0]])
    assert len(calls) == 4


def test_areas() -> None:
    from nodes import ConditioningCombine, ConditioningSetArea

    made, (pos, neg, other) = Made(KIND), prompts(KIND)
    area = ConditioningSetArea().append(other, 64, 64, 64, 0, 1.0)[0]
    both = ConditioningCombine().combine(pos, area)[0]
    model, calls = record_gates(apply(unet(KIND), made, person(made)))
    sample(model, both, neg, latent_noise=noise(height=8, width=16), steps=1)
    identity = positive(person(made))
    pairs = [(pos, [identity]), (neg, []), (other, [identity])]
    seen = [(tuple(call.latent.shape[-2:]), sorted(assert_gates(made, call, pairs))) for call in calls]
    # The negative of the area, which ComfyUI makes up, is a negative as well.
    assert sorted(seen) == [((8, 8), [1, 2]), ((8, 16), [0, 1])]


def test_combined_prompts_with_masks_and_a_batch() -> None:
    from nodes import ConditioningCombine, ConditioningSetMask

    made, (pos, neg, other) = Made(KIND), prompts(KIND)
    first = ConditioningSetMask().append(pos, left_half(), "default", 1.0)[0]
    second = ConditioningSetMask().append(other, 1 - left_half(), "default", 1.0)[0]
    both = ConditioningCombine().combine(first, second)[0]
    model, calls = record_gates(apply(unet(KIND), made, person(made)))
    sample(model, both, neg, steps=1, latent_noise=noise(2))
    identity = positive(person(made))
    pairs = [(pos, [identity]), (neg, []), (other, [identity])]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_attached_identity_replaces_that_of_the_model(kind: str) -> None:
    made, (pos, neg, _) = Made(kind), prompts(kind)
    one, two = person(made, 1), person(made, 2, photos=2)
    model, calls = record_gates(apply(unet(kind), made, one, 0.6))
    sample(model, attach(pos, two), neg)
    for call in calls:
        assert sorted(assert_gates(made, call, [(pos, [positive(two, 0.6)]), (neg, [])])) == [0, 1]
    applied = sample(apply(unet(kind), made, two, 0.6), pos, neg)
    assert torch.equal(sample(apply(unet(kind), made, one, 0.6), attach(pos, two), neg), applied)


@pytest.mark.parametrize("unconditional", ["skip", "zeros"])
def test_attached_as_negative(unconditional: str) -> None:
    made, (pos, neg, other) = Made(KIND, unconditional=unconditional), prompts(KIND)
    one, two = person(made, 1), person(made, 2)
    model, calls = record_gates(apply(unet(KIND), made, one))
    sample(model, [*pos, *attach(other, two)], attach(neg, two, "negative"), steps=1)
    none = [Present(two.adapter_tokens_uncond)] if unconditional == "zeros" else []
    pairs = [(pos, [positive(one)]), (neg, none), (other, [positive(two)])]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 1, 2]]


def test_two_attached_to_one_prompt_take_two_applications() -> None:
    made, (pos, neg, _) = Made(KIND), prompts(KIND)
    people = [person(made, seed) for seed in (1, 2, 3, 4)]
    model = apply(apply(unet(KIND), made, people[0], 0.5), made, people[1], 0.9)
    model, calls = record_gates(model)
    sample(model, attach(attach(pos, people[2]), people[3]), neg, steps=1)
    pairs = [(pos, [positive(people[2], 0.5), positive(people[3], 0.9)]), (neg, [])]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 1]]


def test_attached_to_a_model_on_which_the_adapter_is_switched_off() -> None:
    made, (pos, neg, _) = Made(KIND), prompts(KIND)
    off = apply(unet(KIND), made, person(made, 1), 0.0)
    attached = sample(off, attach(pos, person(made, 2)), neg)
    assert torch.equal(attached, sample(unet(KIND), pos, neg))


def test_attached_person_of_another_adapter() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    made, other, (pos, neg, _) = Made(KIND), Made(KIND, seed=3), prompts(KIND)
    with pytest.raises(InputError, match="no Apply ID Adapter is left on this model"):
        sample(apply(unet(KIND), made, person(made)), attach(pos, person(other)), neg)


def test_attached_person_takes_the_application_of_its_adapter() -> None:
    """Of two adapters on the model the other one is silent for that prompt."""
    one, two, (pos, neg, _) = Made(KIND), Made(KIND, seed=3), prompts(KIND)
    model = apply(apply(unet(KIND), one, person(one), 0.7), two, person(two, 1), 0.4)
    model, calls = record_gates(model)
    sample(model, attach(pos, person(two, 2)), neg, steps=1)
    pairs = [(pos, [positive(person(two, 2), 0.4)]), (neg, [])]
    assert [sorted(assert_gates(two, call, pairs)) for call in calls] == [[0, 1]]


def test_one_of_two_prompts_without_the_identity() -> None:
    """Positive rows of one call that differ in who acts: each has its own."""
    made, (pos, neg, other) = Made(KIND), prompts(KIND)
    identity = person(made)
    nobody = replace(identity, adapter_tokens=None, adapter_bias=None)
    model, calls = record_gates(apply(unet(KIND), made, identity))
    sample(model, [*attach(pos, nobody), *other], neg, steps=1, latent_noise=noise(2))
    pairs = [(pos, []), (other, [positive(identity)]), (neg, [])]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 0, 1, 1, 2, 2]]


def test_a_batch_repeated_as_a_whole() -> None:
    """As tiled sampling does."""
    made, (pos, neg, _) = Made(KIND), prompts(KIND)
    model = apply(unet(KIND), made, person(made))
    assert difference(sample(tiled(model), pos, neg), sample(model, pos, neg)) < 1e-5
