"""Where in the picture gated adapters act."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.nodes.idadapter_sampling import (
    KINDS,
    ByRow,
    Made,
    Present,
    apply,
    assert_gates,
    person,
    positive,
    record_gates,
)
from tests.nodes.sampling import attach, difference, draw, left_half, noise, prompt, rescale, sample, unet
from tests.nodes.test_regrouped_batches import halves, tiled

KIND = "sd15"


def strength(mask: Tensor, size: tuple[int, int], weight: float = 1.0) -> Tensor:
    """The strength of each image token (N, 1): the share of its area that the mask (H, W) covers."""
    return weight * F.adaptive_avg_pool2d(mask[None].double(), size).flatten()[:, None]


def masked(identity: object, masks: Tensor, weight: float = 1.0, latents: int = 1) -> ByRow:
    """An identity under a batch of masks, in a call with so many latents of each conditioning."""

    def given(row: int, size: tuple[int, int]) -> Sequence[Present]:
        return [positive(identity, strength(masks[row % latents % len(masks)], size, weight))]

    return given


@pytest.mark.parametrize("kind", KINDS)
def test_white_is_no_mask(kind: str) -> None:
    made = Made(kind)
    white = draw(apply(unet(kind), made, person(made), mask=torch.ones(1, 64, 64)), kind)
    assert difference(white, draw(apply(unet(kind), made, person(made)), kind)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (10, 14)])
def test_half_a_mask(kind: str, height: int, width: int) -> None:
    """At every site: all of the identity inside, none of it outside, to the bit."""
    made, pos, neg = Made(kind), prompt(kind, "positive"), prompt(kind, "negative")
    identity, mask = person(made, photos=2), left_half(8 * height, 8 * width)
    model, calls = record_gates(apply(unet(kind), made, identity, 0.8, mask=mask))
    sample(model, pos, neg, latent_noise=noise(1, height, width), steps=1)
    (call,) = calls
    assert sorted(assert_gates(made, call, [(pos, masked(identity, mask, 0.8)), (neg, [])])) == [0, 1]
    for _, site in call.gates:
        rows, columns = site.size
        changed = (site.after - site.before).abs().amax(-1).unflatten(1, (rows, columns)).amax((0, 1)) > 0
        inside = torch.arange(columns) < -(-columns // 2)
        assert torch.equal(changed, inside), "the border lies elsewhere"


def test_grey_acts_in_part() -> None:
    made, pos, neg = Made(KIND), prompt(KIND, "positive"), prompt(KIND, "negative")
    model, calls = record_gates(
        apply(unet(KIND), made, person(made), 0.8, mask=torch.full((1, 64, 64), 0.25))
    )
    sample(model, pos, neg, steps=1)
    assert sorted(assert_gates(made, calls[0], [(pos, [positive(person(made), 0.2)]), (neg, [])])) == [0, 1]


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_two_people_with_a_mask_each(kind: str) -> None:
    made, pos, neg = Made(kind), prompt(kind, "positive"), prompt(kind, "negative")
    one, two = person(made, 1), person(made, 2, photos=2)
    left, right = left_half(), 1 - left_half()
    model = apply(apply(unet(kind), made, one, 0.7, mask=left), made, two, 0.9, mask=right)
    model, calls = record_gates(model)
    sample(model, pos, neg, steps=1, latent_noise=noise(2))

    def given(row: int, size: tuple[int, int]) -> Sequence[Present]:
        return [
            positive(one, strength(left[0], size, 0.7)),
            positive(two, strength(right[0], size, 0.9)),
        ]

    (call,) = calls
    assert sorted(assert_gates(made, call, [(pos, given), (neg, [])])) == [0, 0, 1, 1]


def test_a_person_everywhere_and_one_in_a_mask() -> None:
    """Strengths as numbers and as maps go together."""
    made, pos, neg = Made(KIND), prompt(KIND, "positive"), prompt(KIND, "negative")
    one, two, mask = person(made, 1), person(made, 2), left_half()
    for first_masked in (False, True):
        model = unet(KIND)
        for someone in (two, one) if first_masked else (one, two):
            model = apply(model, made, someone, 0.7, mask=mask if someone is two else None)
        model, calls = record_gates(model)
        sample(model, pos, neg, steps=1)

        def given(row: int, size: tuple[int, int]) -> Sequence[Present]:
            return [positive(one, 0.7), positive(two, strength(mask[0], size, 0.7))]

        assert sorted(assert_gates(made, calls[0], [(pos, given), (neg, [])])) == [0, 1]


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_batch_of_masks_goes_with_the_batch_of_latents(kind: str) -> None:
    """Fewer masks than latents start again from the first."""
    made, pos, neg = Made(kind), prompt(kind, "positive"), prompt(kind, "negative")
    identity = person(made)
    top = left_half().transpose(1, 2)
    masks = torch.cat([left_half(), top])
    model, calls = record_gates(apply(unet(kind), made, identity, mask=masks))
    sample(model, pos, neg, steps=1, latent_noise=noise(3))
    pairs = [(pos, masked(identity, masks, latents=3)), (neg, [])]
    assert sorted(assert_gates(made, calls[0], pairs)) == [0, 0, 0, 1, 1, 1]


def test_unconditional_tokens_are_masked_too() -> None:
    made = Made(KIND, unconditional="zeros")
    pos, neg = prompt(KIND, "positive"), prompt(KIND, "negative")
    identity, mask = person(made), left_half()
    model, calls = record_gates(apply(unet(KIND), made, identity, mask=mask))
    sample(model, pos, neg, steps=1)

    def none(row: int, size: tuple[int, int]) -> Sequence[Present]:
        return [Present(identity.adapter_tokens_uncond, None, strength(mask[0], size))]

    assert sorted(assert_gates(made, calls[0], [(pos, masked(identity, mask)), (neg, none)])) == [0, 1]


def test_mask_follows_the_area_of_a_conditioning() -> None:
    """The mask whitens the last quarter of the picture, which is the last half of the area on its right."""
    from nodes import ConditioningSetArea

    made, pos, other = Made(KIND), prompt(KIND, "positive"), prompt(KIND, "other")
    identity = person(made)
    mask = torch.zeros(1, 64, 128)
    mask[..., 96:] = 1
    area = ConditioningSetArea().append(other, 64, 64, 64, 0, 1.0)[0]
    model, calls = record_gates(apply(unet(KIND), made, identity, mask=mask))
    sample(model, pos + area, prompt(KIND, "negative"), latent_noise=noise(1, 8, 16), steps=1, cfg=1.0)
    pairs = [(pos, masked(identity, mask)), (other, masked(identity, mask[..., 64:]))]
    assert sorted(assert_gates(made, call, pairs) for call in calls) == [[0], [1]]


def test_mask_follows_two_areas_of_one_size_with_a_person_each() -> None:
    """They run in one model call, and each sees its own part of the mask."""
    from nodes import ConditioningSetArea

    made, pos, other = Made(KIND), prompt(KIND, "positive"), prompt(KIND, "other")
    one, two = person(made, 1), person(made, 2)
    mask = torch.zeros(1, 64, 128)
    mask[..., 16:48] = 1
    mask[..., 96:] = 1
    left = ConditioningSetArea().append(attach(pos, one), 64, 64, 0, 0, 1.0)[0]
    right = ConditioningSetArea().append(attach(other, two), 64, 64, 64, 0, 1.0)[0]
    model, calls = record_gates(apply(unet(KIND), made, one, mask=mask))
    sample(model, left + right, prompt(KIND, "negative"), latent_noise=noise(1, 8, 16), steps=1, cfg=1.0)
    pairs = [(pos, masked(one, mask[..., :64])), (other, masked(two, mask[..., 64:]))]
    assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 1]]


def test_masks_under_normalized_rescaling() -> None:
    """White is no mask and black places get nothing."""
    made = Made(KIND)
    whole = rescale(apply(unet(KIND), made, person(made)), gated=True)
    white = rescale(apply(unet(KIND), made, person(made), mask=torch.ones(1, 64, 64)), gated=True)
    assert difference(draw(white, KIND), draw(whole, KIND)) < 1e-5
    half, calls = record_gates(rescale(apply(unet(KIND), made, person(made), mask=left_half()), gated=True))
    draw(half, KIND, steps=1, cfg=1.0)
    for _, site in calls[0].gates:
        added = (site.after - site.before)[0].unflatten(0, site.size)
        assert (added[:, : site.size[1] // 2].abs().amax(-1) > 0).all()
        assert not added[:, site.size[1] // 2 :].any()


def test_a_mask_does_not_follow_tiles() -> None:
    made = Made(KIND)
    model = apply(unet(KIND), made, person(made), mask=left_half())
    with pytest.raises(RuntimeError, match="attn_mask cannot follow the tiles"):
        draw(tiled(model), KIND)
    with pytest.raises(RuntimeError, match="attn_mask cannot follow the tiles"):
        draw(halves(model), KIND, latent_noise=noise(1, 8, 16))
