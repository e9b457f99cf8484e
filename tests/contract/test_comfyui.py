"""Properties of every method in ComfyUI alone: several identities, windows, masks, batches, attached identities, other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.hosts import Act, Cast, ComfyHost, base_of, cast_of, host_of
from tests.contract.samples import FAMILIES, METHOD_NAMES, Case

ACTS = 1e-3  # the least that counts as a difference, of predictions around 1
SAME = 1e-5  # the most by which one sum in another order may differ


def left_half(size: int = 64) -> Tensor:
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


@pytest.fixture
def cast(comfy_cast: Cast) -> Cast:
    return comfy_cast


@pytest.fixture
def host(comfy_cast: Cast) -> ComfyHost:
    found: ComfyHost = comfy_cast.host
    return found


# --- switched off ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "off",
    [{"window": (0.3, 0.3)}, {"mask": torch.zeros(1, 64, 64)}],
    ids=["empty window", "black mask"],
)
def test_a_person_who_is_switched_off_changes_nothing(
    off: dict[str, Any], host: ComfyHost, cast: Cast
) -> None:
    assert host.draw(cast.act(**off), steps=1).equals(base_of(host))
    beside = host.draw(cast.act(2), cast.act(1, **off), steps=1)
    assert beside.distance(cast.drawn(2)) <= SAME


def test_branches_of_one_model_do_not_meet(host: ComfyHost, cast: Cast) -> None:
    """Two nodes on one MODEL, drawn in turns."""
    one, two = host.apply(cast.act(1)), host.apply(cast.act(2, 0.5))
    wanted = cast.drawn(1), cast.drawn(2, 0.5)
    for _ in range(2):
        for applied, drawn in zip((one, two), wanted, strict=True):
            assert host.sample(applied, steps=1).equals(drawn)
    further = host.apply(cast.act(1), cast.act(2))
    assert host.sample(further, steps=1).first(wanted[0]) > ACTS
    assert host.sample(one, steps=1).equals(wanted[0])


# --- several ---------------------------------------------------------------------------------------------------------


def test_a_person_twice_at_half_strength_is_once_at_full(host: ComfyHost, cast: Cast) -> None:
    twice = host.draw(cast.act(1, 0.5), cast.act(1, 0.5), steps=1)
    assert twice.distance(cast.drawn(1)) <= SAME


def test_two_people_act_together_in_any_order(host: ComfyHost, cast: Cast) -> None:
    both, other = (host.draw(cast.act(one), cast.act(two), steps=1) for one, two in ((1, 2), (2, 1)))
    assert both.distance(other) <= SAME
    assert both.first(cast.drawn(1)) > ACTS
    assert both.first(cast.drawn(2)) > ACTS


def test_windows_that_meet_are_one(host: ComfyHost, cast: Cast) -> None:
    """Four steps, of which each window has some: none acts in both, and none in neither."""
    early, late = cast.act(window=(0.0, 0.5)), cast.act(window=(0.5, 1.0))
    whole = host.draw(cast.act(), steps=4)
    assert host.draw(early, late, steps=4).distance(whole) <= SAME
    first, second = (host.draw(act, steps=4) for act in (early, late))
    assert torch.equal(first.positive[0], whole.positive[0])
    assert second.first(whole) > ACTS
    # The latents differ by the last step, but the window of a person it does not know must not make it know him.
    stranger = host.draw(cast.act(2, window=(0.5, 1.0)), steps=4)
    assert torch.equal(stranger.positive[0], second.positive[0])
    assert first.distance(whole) > ACTS


def test_masks_that_cover_the_picture_together_are_none(host: ComfyHost, cast: Cast) -> None:
    left = left_half()
    parts = host.draw(cast.act(mask=left), cast.act(mask=1 - left), steps=1)
    assert parts.distance(cast.drawn(1)) <= SAME
    assert host.draw(cast.act(mask=torch.ones(1, 8, 8)), steps=1).distance(cast.drawn(1)) <= SAME
    assert host.draw(cast.act(mask=left), steps=1).first(cast.drawn(1)) > ACTS


@pytest.mark.parametrize("side", ["left", "top"])
def test_a_person_shows_where_their_mask_is_white(side: str, host: ComfyHost, cast: Cast) -> None:
    """Who it is matters more in one half of the picture, which is no square, than with the mask of the other half."""
    size = (96, 160)
    white = torch.zeros(1, *size)
    half = white[..., : size[1] // 2] if side == "left" else white[:, : size[0] // 2]
    half.fill_(1)

    def share(mask: Tensor) -> float:
        """How much of the change between two people lies in the first half."""
        one, two = (host.draw(cast.act(n, mask=mask), steps=1, size=size).positive[0, 0] for n in (1, 2))
        change = (one - two).abs().mean(0)
        first = change[:, : size[1] // 16] if side == "left" else change[: size[0] // 16]
        return float(first.sum() / change.sum())

    here, there = share(white), share(1 - white)
    print(f"{side}: {here:.3f} of the change in the white half, {there:.3f} with the other mask")
    assert here > there + 0.05


# --- rows ------------------------------------------------------------------------------------------------------------


def test_each_latent_of_a_batch_is_as_alone(host: ComfyHost, cast: Cast) -> None:
    """And has the person: the second latent as much as the first."""
    batch, base = host.draw(cast.act(), latents=2, steps=1), base_of(host, latents=2)
    assert torch.equal(base.contexts[0][:1], base_of(host).contexts[0])
    for found, alone in ((batch.positive, cast.drawn().positive), (batch.negative, cast.drawn().negative)):
        torch.testing.assert_close(found[:, :1], alone, atol=SAME, rtol=0)
    assert all((batch.positive - base.positive).abs().amax(dim=(0, 2, 3, 4)) > ACTS)


def test_a_batch_of_masks_goes_with_the_batch_of_latents(host: ComfyHost, cast: Cast) -> None:
    """Where a latent's mask is black, it does not matter who the person is."""
    masks = torch.cat([torch.ones(1, 64, 64), torch.zeros(1, 64, 64)])
    one, two = (host.draw(cast.act(seed, mask=masks), latents=2, steps=1) for seed in (1, 2))
    assert torch.equal(one.positive[:, 1], two.positive[:, 1])
    assert (one.positive[:, 0] - two.positive[:, 0]).abs().max() > ACTS
    torch.testing.assert_close(one.positive[:, :1], cast.drawn(1).positive, atol=SAME, rtol=0)


def test_an_attached_person_takes_the_place_of_the_applied_one(host: ComfyHost, cast: Cast) -> None:
    attached = host.draw(cast.act(1), attached=cast.person(2), steps=1)
    assert attached.equals(cast.drawn(2))


# --- other methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("one", "other"),
    [(one, other) for n, one in enumerate(METHOD_NAMES) for other in METHOD_NAMES[n + 1 :]],
)
def test_methods_act_together_in_any_order(family: str, one: str, other: str, comfyui: Path) -> None:
    host = host_of(ComfyHost, family, comfyui)
    casts = [cast_of(host, Case(name, family)) for name in (one, other)]
    acts: list[Act] = [cast.act() for cast in casts]
    drawn = host.draw(*acts)
    # Sums of several additions round in their order.
    assert drawn.distance(host.draw(*reversed(acts))) < SAME
    for cast in casts:
        assert drawn.first(cast.drawn()) > ACTS
    assert host.draw(acts[0], casts[1].act(strength=0.0), steps=1).equals(casts[0].drawn())
    assert host.draw(steps=1).equals(base_of(host))
