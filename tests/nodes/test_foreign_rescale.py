"""Rescaling what other packs add: inside their masks, with their dials, and leaving alone what adds nothing.

The stand-ins follow packs that are installed often: IPAdapter (a sum with `add`, weights and masks), PLADIS (other weights of the
text's attention), NAG (text attention of two prompts, weighed), Attention Couple (prompts of its own), and SageAttention as an
override of all attention. `tests/real_packs` runs the packs themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden import recipe
from tests.nodes.sampling import (
    apply,
    around_sites,
    difference,
    draw,
    noise,
    person,
    record,
    rescale,
    unet,
)
from tests.nodes.test_other_packs import OtherPatch

KIND = "sd15"
EVERY = "every attention patch"
SIDE = 16  # of the latent, so that a sixteenth of the picture is some tokens wide
Patch = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def in_all_slots(model: Any, make: Callable[[], Any]) -> Any:
    """A node of another pack that replaces the attention of every site."""
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    clone = model.clone()
    for site in attention_sites(model.model_state_dict()):
        clone.set_model_attn2_replace(make(), *site.comfy[:2])
    return clone


def own_tokens(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], *, weight: float, share: float
) -> Tensor:
    """What IPAdapter adds: attention to its own tokens, times a weight, inside a mask of a share of the picture."""
    from comfy.ldm.modules.attention import optimized_attention

    tokens = recipe.value(5, "other", (1, 4, q.shape[-1])).expand(q.shape[0], -1, -1)
    added = weight * optimized_attention(q, tokens, tokens.roll(1, 1), extra["n_heads"])
    height, width = extra["activations_shape"][-2:]
    part = math.sqrt(share)
    mask = torch.zeros(height, width)
    mask[: round(height * part), : round(width * part)] = 1
    return added * mask.flatten()[None, :, None]


def ip_adapter(model: Any, weight: float = 0.5, share: float = 1.0) -> Any:
    return in_all_slots(model, lambda: OtherPatch(own_tokens, weight=weight, share=share))


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], sharper: float = 1.0) -> Tensor:
    heads = extra["n_heads"]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(sharper * q, k, v).transpose(1, 2).flatten(2)


def pladis(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    return 2 * text_attention(q, k, v, extra, sharper=4.0) - text_attention(q, k, v, extra)


def nag(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    other = recipe.value(6, "negative", k.shape)
    away = 4 * text_attention(q, k, v, extra) - 3 * text_attention(q, other, other.roll(1, 1), extra)
    return away / away.norm(dim=-1, keepdim=True) * text_attention(q, k, v, extra).norm(dim=-1, keepdim=True)


def couple(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    own = 3 * recipe.value(7, "couple", k.shape)
    return text_attention(q, own, own.roll(1, 1), extra)


def plain_sum(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    out = text_attention(q, k, v, extra)
    return out + own_tokens(out, q, k, v, extra, weight=0.5, share=1.0)


def local_ratios(model: Any, share: float, **options: Any) -> list[float]:
    """‖what was added‖ / ‖text‖ over the tokens inside the mask, for each row of each site."""
    recorded, calls = record(model)
    draw(recorded, KIND, latent_noise=noise(1, SIDE, SIDE), steps=1, **options)
    ratios: list[float] = []
    for call in calls:
        for site in call.sites.values():
            side = math.isqrt(site.query.shape[1])
            within = round(side * math.sqrt(share))
            text, out = (
                x.unflatten(1, (side, side))[:, :within, :within] for x in (site.text, site.out.double())
            )
            ratios += ((out - text).flatten(1).norm(dim=1) / text.flatten(1).norm(dim=1)).tolist()
    assert ratios
    return ratios


@pytest.mark.parametrize("share", [1, 1 / 4, 1 / 16])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_strength_inside_their_mask_does_not_depend_on_its_size(share: float, scale: float) -> None:
    model = rescale(ip_adapter(unet(KIND), share=share), scope=EVERY, adapter_late=scale)
    for ratio in local_ratios(model, share):
        assert ratio == pytest.approx(scale, abs=0.02 * scale)


def test_outside_their_mask_nothing_changes() -> None:
    model, calls = record(rescale(ip_adapter(unet(KIND), share=1 / 4), scope=EVERY))
    draw(model, KIND, latent_noise=noise(1, SIDE, SIDE), steps=1)
    for call in calls:
        for site in call.sites.values():
            side = math.isqrt(site.query.shape[1])
            text, out = (x.unflatten(1, (side, side)) for x in (site.text, site.out.double()))
            torch.testing.assert_close(out[:, side // 2 :], text[:, side // 2 :], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [1, 1 / 16])
def test_limit_keeps_their_weight_below_the_cap(share: float) -> None:
    """Below it the picture is that without the node, so weights and fades work; above it is the cap's."""

    def limited(weight: float, cap: float) -> Any:
        theirs = ip_adapter(unet(KIND), weight, share)
        return rescale(theirs, "limit", EVERY, adapter_early=cap, adapter_late=cap)

    weak, strong = (local_ratios(ip_adapter(unet(KIND), weight, share), share) for weight in (0.2, 0.8))
    cap = 1.1 * max(strong)
    for weight in (0.2, 0.8):
        free = draw(ip_adapter(unet(KIND), weight, share), KIND)
        assert difference(draw(limited(weight, cap), KIND), free) < 1e-5
    assert max(weak) < 0.5 * max(strong)
    held = local_ratios(limited(0.8, 0.5 * min(strong)), share)
    assert held == pytest.approx([0.5 * min(strong)] * len(held), rel=0.02)
    # `normalized` knows no weights.
    loud, quiet = (
        draw(rescale(ip_adapter(unet(KIND), weight, share), "normalized", EVERY), KIND)
        for weight in (0.8, 0.02)
    )
    assert difference(loud, quiet) < 1e-3


def test_limit_holds_for_our_own_adapters_too() -> None:
    """min(weight, scale · ‖text‖ / ‖residual‖), the sign kept."""
    identity = person(KIND)

    def ours(weight: float, **options: Any) -> Any:
        return rescale(apply(unet(KIND), KIND, identity, weight), **options)

    free = draw(apply(unet(KIND), KIND, identity, 0.3), KIND)
    assert difference(draw(ours(0.3, mode="limit", adapter_early=50, adapter_late=50), KIND), free) < 1e-5
    capped = draw(ours(50.0, mode="limit", adapter_early=0.4, adapter_late=0.4), KIND)
    assert difference(capped, draw(ours(1.0, adapter_early=0.4, adapter_late=0.4), KIND)) < 1e-5
    away = draw(ours(-50.0, mode="limit", adapter_early=0.4, adapter_late=0.4), KIND)
    assert difference(away, draw(ours(-1.0, adapter_early=0.4, adapter_late=0.4), KIND)) < 1e-5
    nothing = draw(ours(0.0, mode="limit"), KIND)
    assert torch.equal(nothing, draw(unet(KIND), KIND))
    assert torch.equal(
        draw(ours(1.0, mode="limit", adapter_early=0.0, adapter_late=0.0), KIND), draw(unet(KIND), KIND)
    )


@pytest.mark.parametrize("changing", [pladis, nag, couple])
@pytest.mark.parametrize("mode", ["normalized", "limit"])
def test_changes_of_the_text_attention_are_left_alone(changing: Patch, mode: str, warnings_on: Any) -> None:
    theirs = in_all_slots(unet(KIND), lambda: changing)
    want = draw(theirs, KIND)
    assert difference(want, draw(unet(KIND), KIND)) > 0.05
    scaled = rescale(theirs, mode, EVERY, adapter_early=0.3, adapter_late=0.3)
    assert difference(draw(scaled, KIND), want) < 1e-5
    # One word about all of its slots, in which the owner is named.
    said = [text for text in warnings_on("Normalized Identity Rescaling") if "left as it is" in text]
    assert len(said) == 1
    assert f"({changing.__name__})" in said[0]


def test_an_addition_in_a_plain_function_is_rescaled(warnings_on: Any) -> None:
    """What follows no convention is tried out once, not at every step."""
    calls: Counter[int] = Counter()

    def counted(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        calls[len(extra["sample_sigmas"])] += 1
        return plain_sum(q, k, v, extra)

    found = draw(rescale(in_all_slots(unet(KIND), lambda: counted), scope=EVERY), KIND, steps=4)
    sites = sum(calls.values()) // 5
    assert sum(calls.values()) == 5 * sites
    assert difference(found, draw(rescale(ip_adapter(unet(KIND)), scope=EVERY), KIND, steps=4)) < 1e-4
    assert not warnings_on("Normalized Identity Rescaling")


def test_an_addition_that_begins_later_is_recognised() -> None:
    """Where nothing is added yet, nothing can be told."""

    def late(adding: Any) -> Patch:
        def patch(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            begun = float(extra["sigmas"].max()) < float(extra["sample_sigmas"][1]) * 1.001
            return adding(q, k, v, extra) if begun else text_attention(q, k, v, extra)

        return patch

    theirs = in_all_slots(unet(KIND), lambda: late(plain_sum))
    _, calls = recorded = record(rescale(theirs, scope=EVERY))
    draw(recorded[0], KIND, steps=3)
    for call, expected in zip(calls, (0.0, 1.0, 1.0), strict=True):
        for site in call.sites.values():
            ratio = (site.out - site.text).norm() / site.text.norm()
            assert float(ratio) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("identity", [False, True])
def test_an_override_of_attention_does_not_count_as_added(identity: bool) -> None:
    """IPAdapter computes the text's attention without the override that the plain reference would go through."""

    def sage(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        return out * 1.2

    def overridden(model: Any) -> Any:
        clone = model.clone()
        clone.model_options["transformer_options"] = {
            **clone.model_options["transformer_options"],
            "optimized_attention_override": sage,
        }
        return clone

    theirs = overridden(ip_adapter(unet(KIND), weight=0.0))
    model = rescale(theirs, scope=EVERY)
    if identity:
        theirs, model = (apply(some, KIND, person(KIND), 0.0) for some in (theirs, model))
    assert difference(draw(model, KIND), draw(theirs, KIND)) < 1e-5
    ratios = local_ratios(rescale(overridden(ip_adapter(unet(KIND))), scope=EVERY), 1.0)
    assert ratios == pytest.approx([1.0] * len(ratios), abs=0.02)


def test_trials_do_not_make_the_host_wait_inside_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their outcome is read between model calls: on the meta device nothing can be read."""
    from ComfyUI_IDAdapter.nodes.host import foreign
    from ComfyUI_IDAdapter.nodes.host.foreign import ForeignSlot, Scale

    # ComfyUI's own attention asks for the free memory of the device.
    monkeypatch.setattr(foreign, "text_attention", text_attention)

    def adding(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return v[:, :1] + q

    slot = ForeignSlot(adding)
    q, k, v = (torch.empty(2, count, 32, device="meta") for count in (64, 77, 77))
    given = {"n_heads": 4, "optimized_attention_override": text_attention}
    found = slot.rescaled(q, k, v, given, Scale(torch.ones((), device="meta"), limit=True))
    assert found.out.shape == q.shape
    assert slot.trial is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_addition(dtype: torch.dtype) -> None:
    """Two ways of computing the same attention differ by their rounding, and by more in half precision."""
    from ComfyUI_IDAdapter.nodes.host.foreign import ForeignSlot, Scale

    def other_order(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return text_attention(q.float(), k.float(), v.float(), extra).to(q.dtype)

    slot = ForeignSlot(other_order)
    q, k, v = (
        recipe.value(3, name, (2, count, 32)).to(dtype) for name, count in (("q", 64), ("k", 77), ("v", 77))
    )
    found = slot.rescaled(q, k, v, {"n_heads": 4}, Scale(torch.tensor(3.0), limit=False))
    torch.testing.assert_close(found.out, other_order(q, k, v, {"n_heads": 4}), atol=2e-2, rtol=2e-2)


def test_texts_below_those_of_the_picture_are_refused_in_words() -> None:
    """KSamplerWithNAG puts its negative below the other texts, and replaces what an attn2 replacement goes past."""

    def with_negative(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> list[Tensor]:
        return [n, *(torch.cat([x, x[:1]]) for x in (context, value))]

    clone = unet(KIND).clone()
    clone.set_model_attn2_patch(with_negative)
    with pytest.raises(RuntimeError, match="3 texts for 2 rows of the picture.*Use an ordinary sampler"):
        draw(apply(clone, KIND, person(KIND)), KIND)


def test_owners_are_named_by_their_pack() -> None:
    from ComfyUI_IDAdapter.nodes.host.owners import owner_of

    def attention() -> None: ...

    attention.__module__ = "/home/me/ComfyUI/custom_nodes/ComfyUI-PLADIS_x_1.nodes"
    attention.__qualname__ = "wrap.<locals>.attention"
    assert owner_of(attention) == "ComfyUI-PLADIS.1 (wrap)"
    attention.__module__ = "/home/me/packs/sd-perturbed-attention.pladis_utils"
    assert owner_of(attention) == "sd-perturbed-attention (wrap)"
    assert owner_of(OtherPatch(own_tokens)).endswith("test_other_packs (OtherPatch)")
    assert owner_of(around_sites).endswith("sampling (around_sites)")
