"""Positive rows meet the identity's tokens and negative rows the unconditional ones, whoever arranges the rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.nodes.sampling import (
    KINDS,
    Conditioning,
    ModelCall,
    apply,
    assert_rows,
    difference,
    noise,
    person,
    prompt,
    record,
    rescale,
    run_guider,
    sample,
    unet,
)


def prompts(kind: str) -> tuple[Conditioning, Conditioning, Conditioning]:
    return prompt(kind, "positive"), prompt(kind, "negative"), prompt(kind, "other")


@pytest.mark.parametrize("kind", KINDS)
def test_cfg_7(kind: str) -> None:
    identity, (positive, negative, _) = person(kind), prompts(kind)
    model, calls = record(apply(unet(kind), kind, identity, 0.7))
    sample(model, positive, negative, cfg=7.0, steps=2)
    assert len(calls) == 2, "positive and negative did not share a call"
    pairs = [(positive, identity.adapter_tokens), (negative, identity.adapter_tokens_uncond)]
    for call in calls:
        assert sorted(assert_rows(kind, call, pairs, weight=0.7)) == [0, 1]


def test_cfg_1_runs_the_positive_rows_alone() -> None:
    identity, (positive, negative, _) = person("sd15"), prompts("sd15")
    model, calls = record(apply(unet("sd15"), "sd15", identity))
    sample(model, positive, negative, cfg=1.0)
    for call in calls:
        assert assert_rows("sd15", call, [(positive, identity.adapter_tokens)]) == [0]


def test_identity_without_unconditional_tokens_leaves_negative_rows_alone() -> None:
    identity, (positive, negative, _) = person("sd15", unconditional=False), prompts("sd15")
    model, calls = record(apply(unet("sd15"), "sd15", identity))
    sample(model, positive, negative)
    for call in calls:
        assert sorted(assert_rows("sd15", call, [(positive, identity.adapter_tokens), (negative, None)])) == [
            0,
            1,
        ]


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg(style: str) -> None:
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    identity, (positive, negative, middle) = person("sdxl"), prompts("sdxl")
    model, calls = record(apply(unet("sdxl"), "sdxl", identity))
    guider = DualCFGGuider.execute(model, positive, middle, negative, 5.0, 3.0, style).result[0]
    run_guider(guider)
    pairs = [
        (positive, identity.adapter_tokens),
        (negative, identity.adapter_tokens_uncond),
        (middle, identity.adapter_tokens),
    ]
    assert len(calls) == 2
    for call in calls:
        assert sorted(assert_rows("sdxl", call, pairs)) == [0, 1, 2]


def test_perp_neg() -> None:
    from comfy_extras.nodes_perpneg import PerpNegGuider

    identity, (positive, negative, empty) = person("sd15"), prompts("sd15")
    model, calls = record(apply(unet("sd15"), "sd15", identity))
    guider = PerpNegGuider.execute(model, positive, negative, empty, 5.0, 1.0).result[0]
    run_guider(guider)
    pairs = [
        (positive, identity.adapter_tokens),
        (negative, identity.adapter_tokens_uncond),
        (empty, identity.adapter_tokens_uncond),
    ]
    assert len(calls) == 2
    for call in calls:
        assert sorted(assert_rows("sd15", call, pairs)) == [0, 1, 2]


def test_self_attention_guidance_and_perturbed_attention() -> None:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    identity, (positive, negative, _) = person("sd15"), prompts("sd15")
    model = apply(unet("sd15"), "sd15", identity)
    model = PerturbedAttentionGuidance.execute(model, 3.0).result[0]
    model = SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0]
    model, calls = record(model)
    # The blur of SAG needs more than 4 latent pixels in the middle block.
    out = sample(model, positive, negative, latent_noise=noise(height=16, width=16), steps=1)
    assert out.isfinite().all()
    pairs = [(positive, identity.adapter_tokens), (negative, identity.adapter_tokens_uncond)]
    rows = [sorted(assert_rows("sd15", call, pairs)) for call in calls]
    # The usual call, then PAG's with the positive and SAG's with the negative, both reported by ComfyUI as index 0.
    assert rows == [[0, 1], [0], [1]]
    assert [call.options["cond_or_uncond"] for call in calls[1:]] == [[0], [0]]


def test_split_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    identity, (positive, negative, _) = person("sdxl"), prompts("sdxl")
    applied = rescale(apply(unet("sdxl"), "sdxl", identity), adapter_early=0.6)
    together = sample(applied, positive, negative)
    model, calls = record(apply(unet("sdxl"), "sdxl", identity))
    # A device on which only one row fits.
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: math.inf)
    sample(model, positive, negative)
    pairs = [(positive, identity.adapter_tokens), (negative, identity.adapter_tokens_uncond)]
    assert sorted(tuple(assert_rows("sdxl", call, pairs)) for call in calls) == [(0,), (0,), (1,), (1,)]
    assert difference(sample(applied, positive, negative), together) < 1e-4


def test_row_of_a_batch_is_the_single_picture() -> None:
    identity, (positive, negative, _) = person("sdxl"), prompts("sdxl")
    model = rescale(apply(unet("sdxl"), "sdxl", identity), adapter_early=0.8, adapter_late=1.2)
    one = sample(model, positive, negative, latent_noise=noise(1))
    recorded, calls = record(model)
    four = sample(recorded, positive, negative, latent_noise=noise(4))
    assert difference(four[:1], one) < 1e-4
    assert difference(four[1:2], one) > 0.1
    assert [call.context.shape[0] for call in calls] == [8, 8]


def test_area() -> None:
    from nodes import ConditioningCombine, ConditioningSetArea

    identity, (positive, negative, other) = person("sd15"), prompts("sd15")
    area = ConditioningSetArea().append(other, 64, 64, 64, 0, 1.0)[0]
    both = ConditioningCombine().combine(positive, area)[0]
    model, calls = record(apply(unet("sd15"), "sd15", identity))
    sample(model, both, negative, latent_noise=noise(height=8, width=16), steps=1)
    pairs = [
        (positive, identity.adapter_tokens),
        (negative, identity.adapter_tokens_uncond),
        (other, identity.adapter_tokens),
    ]
    seen = [(tuple(call.latent.shape[-2:]), sorted(assert_rows("sd15", call, pairs))) for call in calls]
    # The negative of the area, which ComfyUI makes up, has the unconditional tokens as well.
    assert sorted(seen) == [((8, 8), [1, 2]), ((8, 16), [0, 1])]


def test_combined_prompts_with_masks() -> None:
    from nodes import ConditioningCombine, ConditioningSetMask

    identity, (positive, negative, other) = person("sd15"), prompts("sd15")
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    first = ConditioningSetMask().append(positive, left, "default", 1.0)[0]
    second = ConditioningSetMask().append(other, 1 - left, "default", 1.0)[0]
    both = ConditioningCombine().combine(first, second)[0]
    model, calls = record(apply(unet("sd15"), "sd15", identity))
    sample(model, both, negative, steps=1)
    pairs = [
        (positive, identity.adapter_tokens),
        (negative, identity.adapter_tokens_uncond),
        (other, identity.adapter_tokens),
    ]
    assert [sorted(assert_rows("sd15", call, pairs)) for call in calls] == [[0, 1, 2]]


def test_concatenated_and_averaged_prompts() -> None:
    from nodes import ConditioningAverage, ConditioningConcat

    kind = "sd15"
    identity, (positive, negative, other) = person(kind), prompts(kind)
    for mixed in (
        ConditioningConcat().concat(positive, other)[0],
        ConditioningAverage().addWeighted(positive, other, 0.5)[0],
    ):
        model, calls = record(apply(unet(kind), kind, identity))
        sample(model, mixed, negative, steps=1)
        assert len(calls) == 1, "positive and negative did not share a call"
        row_of = {tuple(calls[0].context[row].flatten()[:4].tolist()): row for row in (0, 1)}
        positive_row = row_of[tuple(mixed[0][0][0].flatten()[:4].tolist())]
        check_polarity(kind, calls[0], identity, positive_row)


def check_polarity(kind: str, call: ModelCall, identity: Any, positive_row: int) -> None:
    """For contexts that ComfyUI has changed on the way: the one row has the tokens, the other the unconditional ones."""
    contexts = [[[row[None], {}]] for row in call.context]
    tokens = [
        identity.adapter_tokens if row == positive_row else identity.adapter_tokens_uncond for row in (0, 1)
    ]
    assert assert_rows(kind, call, list(zip(contexts, tokens, strict=True))) == [0, 1]


def test_default_conditioning() -> None:
    """ComfyUI fills what other conditionings leave free with the default one, which has its own tags."""
    from comfy.hooks import set_default_conds_and_combine

    kind = "sd15"
    identity, (positive, negative, other) = person(kind), prompts(kind)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    masked = [[states, {**options, "mask": left}] for states, options in positive]
    both = set_default_conds_and_combine([masked], [other])[0]
    model, calls = record(apply(unet(kind), kind, identity))
    sample(model, both, negative, steps=1)
    pairs = [
        (positive, identity.adapter_tokens),
        (negative, identity.adapter_tokens_uncond),
        (other, identity.adapter_tokens),
    ]
    assert sorted(row for call in calls for row in assert_rows(kind, call, pairs)) == [0, 1, 2]


def test_conditionings_of_the_user_are_left_alone() -> None:
    positive, negative, _ = prompts("sd15")
    before = [dict(options) for _, options in (*positive, *negative)]
    sample(apply(unet("sd15"), "sd15", person("sd15")), positive, negative)
    assert [options for _, options in (*positive, *negative)] == before
