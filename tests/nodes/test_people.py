"""Several people in one graph, by masks on the MODEL or attached to conditionings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.nodes.sampling import (
    Conditioning,
    apply,
    assert_rows,
    attach,
    difference,
    draw,
    left_half,
    noise,
    person,
    prompt,
    record,
    rescale,
    sample,
    unet,
)

KIND = "sd15"


def halves() -> tuple[Tensor, Tensor]:
    left = left_half()
    return left, 1 - left


@pytest.mark.parametrize("rescaled", [False, True])
def test_each_half_shows_its_own_person(rescaled: bool) -> None:
    left, right = halves()
    options = {"latent_noise": noise(1, 16, 32), "steps": 1, "cfg": 1.0}

    def picture(first: int, second: int) -> Tensor:
        model = apply(unet(KIND), KIND, person(KIND, first), mask=left)
        model = apply(model, KIND, person(KIND, second), mask=right)
        return draw(rescale(model) if rescaled else model, KIND, **options)

    base = picture(1, 2)
    for changed, mine in ((picture(3, 2), slice(0, 16)), (picture(1, 3), slice(16, 32))):
        change = (changed - base).abs()
        theirs = slice(16, 32) if mine.start == 0 else slice(0, 16)
        assert change[..., mine].mean() > 2 * change[..., theirs].mean()


def test_people_of_different_token_counts_and_roles_in_one_batch() -> None:
    """Rows whose identities have unequal token counts cannot share an attention call, and still get the right one."""
    from dataclasses import replace

    kind = KIND
    few = person(kind, 2)
    few = replace(
        few, adapter_tokens=few.adapter_tokens[:, :7], adapter_tokens_uncond=few.adapter_tokens_uncond[:, :4]
    )
    positive, negative = prompt(kind, "positive"), prompt(kind, "negative")
    model, calls = record(apply(unet(kind), kind, few))
    sample(model, positive, negative, latent_noise=noise(3), steps=1)
    pairs = [(positive, few.adapter_tokens), (negative, few.adapter_tokens_uncond)]
    assert len(calls) == 1
    assert sorted(assert_rows(kind, calls[0], pairs)) == [0, 0, 0, 1, 1, 1]


def test_attached_identity_replaces_that_of_the_model() -> None:
    one, two = person(KIND, 1), person(KIND, 2)
    positive, negative = prompt(KIND, "positive"), prompt(KIND, "negative")
    model, calls = record(apply(unet(KIND), KIND, one, 0.6))
    sample(model, attach(positive, two), negative)
    pairs = [(positive, two.adapter_tokens), (negative, one.adapter_tokens_uncond)]
    for call in calls:
        assert sorted(assert_rows(KIND, call, pairs, weight=0.6)) == [0, 1]
    # And is the same as applying it, but for the negative.
    attached = sample(apply(unet(KIND), KIND, one), attach(positive, two), attach(negative, two, "negative"))
    applied = sample(apply(unet(KIND), KIND, two), positive, negative)
    assert torch.equal(attached, applied)


def test_attaching_leaves_the_conditioning_alone() -> None:
    positive = prompt(KIND, "positive")
    before = dict(positive[0][1])
    attached = attach(positive, person(KIND))
    assert positive[0][1] == before
    assert attached[0][0] is positive[0][0]


@pytest.mark.parametrize("way", ["masks", "areas"])
def test_one_person_per_prompt(way: str) -> None:
    from nodes import ConditioningSetArea, ConditioningSetMask

    one, two, absent = person(KIND, 1), person(KIND, 2), person(KIND, 3)
    first, second, negative = prompt(KIND, "positive"), prompt(KIND, "other"), prompt(KIND, "negative")
    left, right = halves()

    def place(conditioning: Conditioning, mask: Tensor, x: int) -> Conditioning:
        if way == "masks":
            placed: Conditioning = ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]
        else:
            placed = ConditioningSetArea().append(conditioning, 64, 64, x, 0, 1.0)[0]
        return placed

    both = place(attach(first, one), left, 0) + place(attach(second, two), right, 64)
    model, calls = record(apply(unet(KIND), KIND, absent))
    sample(model, both, negative, latent_noise=noise(1, 8, 16), steps=1)
    pairs = [
        (first, one.adapter_tokens),
        (second, two.adapter_tokens),
        (negative, absent.adapter_tokens_uncond),
    ]
    rows = [row for call in calls for row in assert_rows(KIND, call, pairs)]
    assert {0, 1, 2} == set(rows)
    assert rows.count(0) == rows.count(1) == 1


def test_two_attached_to_one_prompt_take_two_applications() -> None:
    """In the order of the nodes: the first attached takes the first application with its mask, the second the second."""
    left, right = halves()
    people = [person(KIND, seed) for seed in (1, 2, 3, 4)]
    positive, negative = prompt(KIND, "positive"), prompt(KIND, "negative")

    def model(first: int, second: int) -> object:
        applied = apply(unet(KIND), KIND, people[first], mask=left)
        return apply(applied, KIND, people[second], mask=right)

    twice = attach(attach(positive, people[2]), people[3])
    attached = sample(model(0, 1), twice, negative, cfg=1.0)
    assert difference(attached, sample(model(2, 3), positive, negative, cfg=1.0)) < 1e-6
    assert difference(attached, sample(model(3, 2), positive, negative, cfg=1.0)) > 0.01


def test_more_people_attached_than_applied() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    positive, negative = prompt(KIND, "positive"), prompt(KIND, "negative")
    twice = attach(attach(positive, person(KIND, 1)), person(KIND, 2))
    model, calls = record(apply(unet(KIND), KIND, person(KIND)))
    with pytest.raises(InputError, match="no Apply ID Adapter is left on this model .*pytorch_model.bin"):
        sample(model, twice, negative)
    assert calls == []


def test_attached_person_of_another_adapter() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    positive, negative = prompt(KIND, "positive"), prompt(KIND, "negative")
    model = apply(unet(KIND), KIND, person(KIND))
    with pytest.raises(InputError, match="no Apply ID Adapter is left"):
        sample(model, attach(positive, person("sdxl")), negative)


def test_an_attached_role_that_contradicts_its_use_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """As when an attached positive goes through a node and ends up as the negative."""
    kind, identity = "sd15", person("sd15")
    model = apply(unet(kind), kind, identity)
    sample(model, prompt(kind, "positive"), attach(prompt(kind, "negative"), identity, "positive"))
    assert "attached as positive is used as negative" in caplog.text


def test_a_black_mask_is_said(caplog: pytest.LogCaptureFixture) -> None:
    apply(unet("sd15"), "sd15", person("sd15"), mask=torch.zeros(1, 8, 8))
    assert "attn_mask is black everywhere" in caplog.text
