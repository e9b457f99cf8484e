"""Where in the picture an identity acts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.nodes.sampling import (
    KINDS,
    Conditioning,
    ModelCall,
    apply,
    difference,
    draw,
    identity_part,
    left_half,
    noise,
    person,
    prompt,
    record,
    rescale,
    sample,
    unet,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescaled", [False, True])
def test_black_is_no_adapter_and_white_is_no_mask(kind: str, rescaled: bool) -> None:
    def model(mask: Tensor | None) -> Tensor:
        applied = apply(unet(kind), kind, person(kind), mask=mask)
        return draw(rescale(applied) if rescaled else applied, kind)

    assert torch.equal(model(torch.zeros(1, 64, 64)), draw(unet(kind), kind))
    assert difference(model(torch.ones(1, 64, 64)), model(None)) < 1e-5


def per_token(call: ModelCall, kind: str, tokens: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """For each site its resolution, and how much of the identity each image token of row 0 got: (h, w)."""
    height, width = call.latent.shape[-2:]
    found = []
    for block, site in call.sites.items():
        part = identity_part(kind, call, block, tokens)[0]
        got = ((site.out.double() - site.text)[0] * part).sum(-1) / (part * part).sum(-1)
        level = next(
            level for level in range(4) if -(-height // 2**level) * -(-width // 2**level) == len(got)
        )
        size = (-(-height // 2**level), -(-width // 2**level))
        found.append((size, got.view(size)))
    return found


def assert_acts_on(got: Tensor, start: float, end: float) -> None:
    """Columns start..end, in tokens, get all of the identity and the others nothing; the border is soft by one token."""
    columns = torch.arange(got.shape[1])
    covered = (torch.clamp(columns + 1, max=end) - torch.clamp(columns, min=start)).clamp(0, 1)
    border = ((columns + 0.5 - start).abs() < 1) | ((columns + 0.5 - end).abs() < 1)
    for chosen, tolerance in ((~border, 1e-4), (border, 0.16)):
        wanted = covered[chosen].expand(got.shape[0], -1).double()
        torch.testing.assert_close(got[:, chosen], wanted, atol=tolerance, rtol=0)


def got_per_token(
    kind: str, mask: Tensor, height: int = 8, width: int = 8
) -> list[tuple[tuple[int, int], Tensor]]:
    identity = person(kind)
    model, calls = record(apply(unet(kind), kind, identity, mask=mask))
    draw(model, kind, latent_noise=noise(1, height, width), steps=1, cfg=1.0)
    return per_token(calls[0], kind, identity.adapter_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (12, 8), (10, 14)])
def test_half_a_mask_acts_on_half_the_tokens(kind: str, height: int, width: int) -> None:
    seen = got_per_token(kind, left_half(8 * height, 8 * width), height, width)
    for (_, columns), got in seen:
        assert_acts_on(got, 0, columns / 2)


def test_grey_acts_in_part() -> None:
    for _, got in got_per_token("sd15", torch.full((1, 64, 64), 0.25)):
        torch.testing.assert_close(got, torch.full_like(got, 0.25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (8, 8), (2, 2), (600, 24)])
def test_mask_of_another_size(size: tuple[int, int]) -> None:
    """A mask is stretched over the picture, whatever its size and aspect."""
    top = torch.zeros(1, *size)
    top[:, : size[0] // 2] = 1
    for (rows, _), got in got_per_token("sd15", top, 16, 16):
        assert got[: rows // 4].min() > 0.9
        assert got[-(rows // 4) :].max() < 0.1


def test_mask_without_a_batch_dimension() -> None:
    flat = draw(apply(unet("sd15"), "sd15", person("sd15"), mask=left_half()[0]), "sd15")
    assert torch.equal(flat, draw(apply(unet("sd15"), "sd15", person("sd15"), mask=left_half()), "sd15"))


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_picture_reacts_mostly_in_the_mask(rescaled: bool) -> None:
    model = apply(unet("sd15"), "sd15", person("sd15"), mask=left_half())
    model = rescale(model) if rescaled else model
    options = {"latent_noise": noise(1, 16, 16), "steps": 1, "cfg": 1.0}
    change = (draw(model, "sd15", **options) - draw(unet("sd15"), "sd15", **options)).abs()
    assert change[..., :8].mean() > 2 * change[..., 8:].mean()


def test_batch_of_masks_goes_with_the_batch_of_latents() -> None:
    kind, identity = "sdxl", person("sdxl")
    masks = torch.cat([left_half(), 1 - left_half(), torch.zeros(1, 64, 64)])
    together = draw(apply(unet(kind), kind, identity, mask=masks), kind, latent_noise=noise(3))
    for number in range(3):
        one = apply(unet(kind), kind, identity, mask=masks[number : number + 1])
        alone = draw(one, kind, latent_noise=noise(3)[number : number + 1])
        assert difference(together[number : number + 1], alone) < 1e-4
    # Fewer masks than latents start again from the first.
    again = draw(apply(unet(kind), kind, identity, mask=masks[:2]), kind, latent_noise=noise(3))
    expected = draw(apply(unet(kind), kind, identity, mask=masks[[0, 1, 0]]), kind, latent_noise=noise(3))
    assert torch.equal(again, expected)


def test_mask_follows_the_area_of_a_conditioning() -> None:
    """The mask whitens the last quarter of the picture, which is the last half of the area on its right."""
    from nodes import ConditioningSetArea

    kind, identity = "sd15", person("sd15")
    mask = torch.zeros(1, 64, 128)
    mask[..., 96:] = 1
    whole: Conditioning = prompt(kind, "positive")
    area: Conditioning = ConditioningSetArea().append(prompt(kind, "other"), 64, 64, 64, 0, 1.0)[0]
    model, calls = record(apply(unet(kind), kind, identity, mask=mask))
    sample(model, whole + area, prompt(kind, "negative"), latent_noise=noise(1, 8, 16), steps=1, cfg=1.0)
    by_width = {call.latent.shape[-1]: per_token(call, kind, identity.adapter_tokens) for call in calls}
    for start, sizes in ((0.75, by_width[16]), (0.5, by_width[8])):
        for (_, columns), got in sizes:
            assert_acts_on(got, start * columns, columns)


def test_mask_that_is_none_is_refused() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    with pytest.raises(InputError, match=r"attn_mask must be a MASK .* got \(1, 3, 8, 8\)"):
        apply(unet("sd15"), "sd15", person("sd15"), mask=torch.ones(1, 3, 8, 8))
    with pytest.raises(InputError, match="not finite"):
        apply(unet("sd15"), "sd15", person("sd15"), mask=torch.full((1, 8, 8), float("nan")))
