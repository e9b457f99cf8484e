"""Merged identities in the picture: the two people's own at the ends, and no jump where the ratio leaves them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.nodes import idadapter_sampling as gated
from tests.nodes.sampling import adapter, apply, difference, draw, node, person, unet

ENDS = (0.0, 1e-4, 0.5, 1 - 1e-4, 1.0)


def merge(one: Any, other: Any, ratio: float) -> Any:
    return node("IDAdapterMergeIdentities", one, other, ratio)


def assert_between(pictures: dict[float, torch.Tensor]) -> None:
    first, near_first, middle, near_second, second = (pictures[ratio] for ratio in ENDS)
    apart = difference(first, second)
    assert apart > 0
    assert difference(first, near_first) < 0.02 * apart
    assert difference(second, near_second) < 0.02 * apart
    assert difference(middle, first) > 0.1 * apart
    assert difference(middle, second) > 0.1 * apart


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_uniid_draws_somebody_between(kind: str) -> None:
    one, other = person(kind, 1), person(kind, 2)
    other = replace(other, adapter_tokens_uncond=one.adapter_tokens_uncond)
    assert adapter(kind)
    pictures = {r: draw(apply(unet(kind), kind, merge(one, other, r)), kind) for r in ENDS}
    torch.testing.assert_close(pictures[0.0], draw(apply(unet(kind), kind, one), kind), atol=0, rtol=0)
    torch.testing.assert_close(pictures[1.0], draw(apply(unet(kind), kind, other), kind), atol=0, rtol=0)
    assert_between(pictures)


@pytest.mark.parametrize("photos", [(4, 4), (1, 1), (4, 2)])
def test_idadapter_draws_somebody_between(photos: tuple[int, int]) -> None:
    """Of equally many photos, and of different numbers, whose tokens stand side by side."""
    made = gated.Made("sd15")
    one, other = (gated.person(made, seed, count) for seed, count in zip((1, 2), photos, strict=True))
    pictures = {r: draw(gated.apply(unet("sd15"), made, merge(one, other, r)), "sd15") for r in ENDS}
    assert_between(pictures)
