"""Other packs' attention replacements: the order of the nodes does not matter, and they can be rescaled too.

IPAdapter, InstantID and PuLID share one convention: an object in `patches_replace["attn2"]`, under a block's two-part key
for SD1.5 and its three-part key for SDXL, to which the next such node adds its callback. `OtherPatch` follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes.sampling import (
    SITE_COUNT,
    apply,
    difference,
    draw,
    identity_part,
    person,
    record,
    rescale,
    unet,
)

Callback = Callable[..., Tensor]


class OtherPatch:
    """One slot: text attention, then everything that nodes have added."""

    def __init__(self, callback: Callback, **kwargs: Any) -> None:
        self.added: list[tuple[Callback, dict[str, Any]]] = []
        self.add(callback, **kwargs)

    def add(self, callback: Callback, **kwargs: Any) -> None:
        self.added.append((callback, kwargs))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        dtype = q.dtype
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        for callback, kwargs in self.added:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out.to(dtype=dtype)


def other_callback(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_options: dict[str, Any],
    *,
    seed: int,
    weight: float,
    seen: Counter[Any],
) -> Tensor:
    """Decoupled attention over tokens of its own, as those packs add it; counts the layers it acts in."""
    from comfy.ldm.modules.attention import optimized_attention

    seen[(*extra_options["block"], extra_options["block_index"])] += 1
    tokens = recipe.value(seed, "other", (1, 4, q.shape[-1])).expand(q.shape[0], -1, -1)
    return weight * optimized_attention(q, tokens, tokens.roll(1, 1), extra_options["n_heads"])


def other_node(model: Any, kind: str, seed: int = 5, weight: float = 0.5) -> tuple[Any, Counter[Any]]:
    """A node of another pack: a clone with its callback in every slot, and how often it ran in each layer."""
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    seen: Counter[Any] = Counter()
    clone = model.clone()
    options = clone.model_options["transformer_options"] = {**clone.model_options["transformer_options"]}
    replace = options["patches_replace"] = {**options.get("patches_replace", {})}
    slots = replace["attn2"] = {**replace.get("attn2", {})}
    for site in attention_sites(model.model_state_dict()):
        slot = site.comfy if kind == "sdxl" else site.comfy[:2]
        arguments = {"seed": seed, "weight": weight, "seen": seen}
        if slot in slots:
            slots[slot].add(other_callback, **arguments)
        else:
            slots[slot] = OtherPatch(other_callback, **arguments)
    return clone, seen


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_order_of_the_nodes_does_not_matter(kind: str, rescaled: bool) -> None:
    base, identity = unet(kind), person(kind)

    def ours(model: Any) -> Any:
        applied = apply(model, kind, identity)
        return rescale(applied, scope="every attention patch", adapter_early=0.8) if rescaled else applied

    theirs_first, seen_first = other_node(base, kind)
    theirs_last, seen_last = other_node(ours(base), kind)
    first, last = draw(ours(theirs_first), kind), draw(theirs_last, kind)
    assert torch.equal(first, last)
    assert seen_first == seen_last
    assert len(seen_first) == SITE_COUNT[kind]
    assert set(seen_first.values()) == {2}
    # Both act.
    assert difference(first, draw(other_node(base, kind)[0], kind)) > 0.01
    assert difference(first, draw(ours(base), kind)) > 0.01


def test_two_other_packs_around_ours() -> None:
    kind, identity = "sdxl", person("sdxl")
    around = other_node(apply(other_node(unet(kind), kind, 5)[0], kind, identity), kind, 6)[0]
    before = apply(other_node(other_node(unet(kind), kind, 5)[0], kind, 6)[0], kind, identity)
    assert torch.equal(draw(around, kind), draw(before, kind))


def test_their_slots_are_left_as_they_were() -> None:
    theirs, _ = other_node(unet("sd15"), "sd15")
    slots = theirs.model_options["transformer_options"]["patches_replace"]["attn2"]
    before = dict(slots)
    counts = [len(slot.added) for slot in slots.values()]
    draw(rescale(apply(theirs, "sd15", person("sd15")), scope="every attention patch"), "sd15")
    assert slots == before
    assert [len(slot.added) for slot in slots.values()] == counts


def test_their_tensors_are_left_as_they_were() -> None:
    """A pack may keep what it returned, to use it again."""
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(OtherPatch):
        def __call__(self, *arguments: Any) -> Tensor:
            out = super().__call__(*arguments)
            kept.append((out, out.clone()))
            return out

    clone = unet("sd15").clone()
    clone.set_model_attn2_replace(Keeping(other_callback, seed=5, weight=0.5, seen=Counter()), "middle", 0)
    draw(apply(clone, "sd15", person("sd15")), "sd15")
    assert len(kept) == 2
    for out, copy in kept:
        assert torch.equal(out, copy)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_their_part_is_rescaled_on_demand(kind: str) -> None:
    """Without any identity of ours: prompt control for a graph of other packs."""
    theirs, _ = other_node(unet(kind), kind)
    unscaled, unscaled_calls = record(
        rescale(theirs, scope="ID adapters", adapter_early=0.4, adapter_late=1.5)
    )
    scaled, calls = record(
        rescale(theirs, scope="every attention patch", adapter_early=0.4, adapter_late=1.5)
    )
    assert torch.equal(draw(unscaled, kind), draw(theirs, kind))
    draw(scaled, kind, steps=2)
    assert len(calls) == 2
    for call, scale in zip(calls, (0.4, 1.5), strict=True):
        assert len(call.sites) == SITE_COUNT[kind]
        for site in call.sites.values():
            text = site.text
            ratio = (site.out - text).flatten(1).norm(dim=1) / text.flatten(1).norm(dim=1)
            torch.testing.assert_close(ratio, torch.full_like(ratio, scale), rtol=1e-4, atol=1e-4)
    assert unscaled_calls[0].own is None


@pytest.mark.parametrize("scope", ["ID adapters", "every attention patch"])
def test_scope_with_an_identity(scope: str) -> None:
    """Ours gets the norm scale * what counts as text; theirs only where the scope says so."""
    kind = "sdxl"
    theirs, _ = other_node(unet(kind), kind)
    identity = person(kind)
    ours, calls = record(rescale(apply(theirs, kind, identity), scope=scope, adapter_late=0.8))
    draw(ours, kind, steps=1, cfg=1.0)
    (call,) = calls
    for block, site in call.sites.items():
        text = site.text
        tokens = recipe.value(5, "other", (1, 4, site.query.shape[-1]))
        their_part = 0.5 * site.attention(tokens, tokens.roll(1, 1))
        our_part = identity_part(kind, call, block, identity.adapter_tokens)
        if scope == "every attention patch":
            their_part = scaled_to(their_part, text, 0.8)
            expected = text + their_part + scaled_to(our_part, text, 0.8)
        else:
            base = text + their_part
            expected = base + scaled_to(our_part, base, 0.8)
        torch.testing.assert_close(site.out.double(), expected, atol=2e-5, rtol=1e-4)


def scaled_to(part: Tensor, base: Tensor, scale: float) -> Tensor:
    """`part` at scale times the norm of `base`, for each row."""
    norms = base.flatten(1).norm(dim=1) / part.flatten(1).norm(dim=1)
    return part * (scale * norms)[:, None, None]


def test_prompt_that_another_pack_multiplies() -> None:
    """Attention Couple: rows are repeated before the attention and folded again after it."""
    kind = "sd15"

    def couple(model: Any, copies: int) -> Any:
        def multiply(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> list[Tensor]:
            roles = extra["cond_or_uncond"]
            chunks = zip(roles, *(x.chunk(len(roles)) for x in (n, context, value)), strict=True)
            rows: list[list[Tensor]] = [[], [], []]
            for role, *parts in chunks:
                for target, part in zip(rows, parts, strict=True):
                    target.extend([part] * (1 if role == 1 else copies))
            return [torch.cat(parts) for parts in rows]

        def fold(n: Tensor, extra: dict[str, Any]) -> Tensor:
            kinds = extra["cond_or_uncond"]
            counts = [1 if role == 1 else copies for role in kinds]
            parts = iter(n.chunk(sum(counts)))
            return torch.cat([torch.stack([next(parts) for _ in range(count)]).mean(0) for count in counts])

        clone = model.clone()
        clone.set_model_attn2_patch(multiply)
        clone.set_model_attn2_output_patch(fold)
        return clone

    applied = rescale(apply(unet(kind), kind, person(kind)))
    coupled = draw(couple(applied, 3), kind)
    # Each of the equal copies gets the identity, so their mean is the uncoupled picture.
    assert difference(coupled, draw(applied, kind)) < 1e-4
    assert difference(coupled, draw(unet(kind), kind)) > 0.01
