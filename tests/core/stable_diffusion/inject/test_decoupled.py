"""UniID injected into a diffusers UNet: it adds what the paper says, learns, and leaves without a trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError
from idadapter_core.sites import attention_sites
from idadapter_core.stable_diffusion.inject import Injected, inject
from tests.core.stable_diffusion.inject.checks import (
    AsItWas,
    require_derivatives,
    require_gradients,
    require_no_waiting,
    require_same_gradients,
)
from tests.core.stable_diffusion.inject.decoupled import tokens
from tests.golden import recipe
from tests.tiny.diffusers_unet import (
    diffusers_unet,
    failing,
    gradients_of,
    in_double,
    inputs,
    loss_of,
    observed,
    predict,
    relative,
    traces,
    trainable,
)
from tests.tiny.uniid import CONFIGS, tiny_uniid

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter() -> Adapter:
    return tiny_uniid(CONFIGS["sd15"])


# --- acting ----------------------------------------------------------------------------------------------------------


def attention(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Plain attention of (B, N, C) over (B or 1, T, C) in double precision, head-merged."""
    rows, _, channels = query.shape

    def split(x: Tensor) -> Tensor:
        return x.expand(rows, -1, -1).unflatten(2, (heads, channels // heads)).transpose(1, 2).double()

    scores = split(query) @ split(keys).transpose(2, 3) / (channels // heads) ** 0.5
    return (scores.softmax(-1) @ split(values)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rescale", [False, True])
def test_each_site_adds_its_attention_over_the_identity(kind: str, rescale: bool) -> None:
    """Before the output projection, each row with its own tokens and strength."""
    unet, adapter = diffusers_unet(kind), tiny_uniid(CONFIGS[kind])
    people, strengths = tokens(2, kind), torch.tensor([0.7, 1.3])
    injected = inject(unet, adapter)
    sites = attention_sites(unet.state_dict())
    seen: dict[tuple[int, str], Tensor] = {}
    for site in sites:
        layer = unet.get_submodule(site.diffusers_module)
        for name in ("to_q", "to_k", "to_v"):

            def note(_: Any, args: Any, output: Tensor, key: tuple[int, str] = (site.index, name)) -> None:
                seen[key] = output.clone()

            layer.get_submodule(name).register_forward_hook(note)

        def given(_: Any, args: Any, key: tuple[int, str] = (site.index, "to_out")) -> None:
            seen[key] = args[0].clone()

        layer.to_out[0].register_forward_pre_hook(given)
    with injected.identity(people, strengths, rescale=rescale):
        predict(unet, kind)
    for site in sites:
        heads = unet.get_submodule(site.diffusers_module).heads
        query, keys, values, found = (seen[site.index, name] for name in ("to_q", "to_k", "to_v", "to_out"))
        text = attention(query, keys, values, heads)
        projection = adapter.layers.adapter_modules[str(site.index)]
        own_keys, own_values = (
            F.linear(people, part.weight) for part in (projection.to_k_ip, projection.to_v_ip)
        )
        added = attention(query, own_keys, own_values, heads)
        scale = strengths.double()
        if rescale:
            scale = scale * text.flatten(1).norm(dim=1) / added.flatten(1).norm(dim=1)
        want = text + scale[:, None, None] * added
        torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=1e-4)
        assert (want - text).norm() > 0.1 * text.norm()


def test_without_an_identity_the_unet_is_as_it_is(unet: Any, adapter: Adapter) -> None:
    base = predict(unet)
    injected = inject(unet, adapter)
    assert torch.equal(predict(unet), base)
    for rescale in (False, True):
        with injected.identity(tokens(), rescale=rescale):
            assert (predict(unet) - base).abs().max() > 0.01
        assert torch.equal(predict(unet), base), "the identity was not cleared"
    with pytest.raises(KeyError), injected.identity(tokens()):
        raise KeyError
    assert torch.equal(predict(unet), base), "the identity was not cleared after an error"
    injected.set_identity(tokens())
    with_identity = predict(unet)
    assert torch.equal(predict(unet), with_identity)
    injected.set_identity(None)
    assert torch.equal(predict(unet), base)


@pytest.mark.parametrize("rescale", [False, True])
def test_strength_0_is_no_adapter(kind: str, rescale: bool) -> None:
    unet, adapter = diffusers_unet(kind), tiny_uniid(CONFIGS[kind])
    base = predict(unet, kind)
    injected = inject(unet, adapter)
    with injected.identity(tokens(1, kind), 0.0, rescale=rescale):
        assert torch.equal(predict(unet, kind), base)
    with injected.identity(tokens(1, kind), torch.tensor([0.0, 1.0]), rescale=rescale):
        out = predict(unet, kind)
    assert torch.equal(out[0], base[0])
    assert (out[1] - base[1]).abs().max() > 0.01


@pytest.mark.parametrize("rescale", [False, True])
def test_each_row_has_its_own_tokens_and_strength_alone(unet: Any, adapter: Adapter, rescale: bool) -> None:
    injected = inject(unet, adapter)
    people, strengths = tokens(3), torch.tensor([0.5, 1.0, 2.0])
    with injected.identity(people, strengths, rescale=rescale):
        together = predict(unet, rows=3)
    for row in range(3):
        with injected.identity(people[row : row + 1], float(strengths[row]), rescale=rescale):
            torch.testing.assert_close(predict(unet, rows=3)[row], together[row], atol=1e-5, rtol=0)
    others = people + torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    with injected.identity(others, strengths * torch.tensor([1.0, 3.0, 0.0]), rescale=rescale):
        changed = predict(unet, rows=3)
    assert torch.equal(changed[0], together[0])
    assert not torch.equal(changed[1], together[1])


def test_tokens_of_zeros_add_nothing(unet: Any, adapter: Adapter) -> None:
    """As those of a fresh adapter: rescaled to the text's norm, nothing is still nothing, and gradients are finite."""
    base, parameters = predict(unet), trainable(adapter)
    injected = inject(unet, adapter)
    for rescale in (False, True):
        nobody = torch.zeros_like(tokens()).requires_grad_()
        with injected.identity(nobody, rescale=rescale):
            assert torch.equal(predict(unet), base)
            loss_of(unet).backward()
        assert nobody.grad is not None
        assert nobody.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
def test_gradients_are_those_of_the_loss(kind: str, rescale: bool) -> None:
    """Along a random direction of each group of parameters and of the tokens, in a UNet of double precision."""
    unet, adapter = diffusers_unet(kind).double(), tiny_uniid(CONFIGS[kind])
    parameters = trainable(adapter)
    person = tokens(2, kind).requires_grad_()
    injected = inject(unet, adapter)
    given = in_double(inputs(kind))
    target = recipe.value(0, "unet.target", (2, 4, 8, 8)).double()
    everything = {**parameters, "tokens": person}

    def loss() -> Tensor:
        with injected.identity(person, torch.tensor([0.0, 0.8]), rescale=rescale):
            out: Tensor = unet(**given).sample
        return (out * target).sum()

    require_gradients(unet, loss, everything, dropped=0)
    assert len(parameters) == 2 * len(attention_sites(unet.state_dict()))
    groups: list[Callable[[str], bool]] = [
        lambda name: "to_k_ip" in name,
        lambda name: "to_v_ip" in name,
        lambda name: name == "tokens",
    ]
    # K and V of the identity are projected in single precision.
    require_derivatives(loss, everything, groups, step=1e-3, tolerance=1e-2)


def gradients(
    kind: str, checkpointing: bool, after: Callable[[Injected], None] = lambda injected: None
) -> dict[str, Tensor]:
    """Gradients of all parameters and the tokens; `after` runs between the forward and the backward pass."""
    unet, adapter = diffusers_unet(kind).train(), tiny_uniid(CONFIGS[kind])
    parameters = trainable(adapter)
    person = tokens(2, kind).requires_grad_()
    injected = inject(unet, adapter)
    injected.set_identity(person, torch.tensor([0.5, 1.0]), rescale=True)
    return gradients_of(unet, kind, {**parameters, "tokens": person}, checkpointing, lambda: after(injected))


@pytest.mark.parametrize(
    "after",
    [
        lambda injected: None,
        lambda injected: injected.set_identity(None),
        lambda injected: injected.set_identity(tokens(1, name="another"), 0.3),
        lambda injected: predict(injected.unet),
    ],
    ids=["nothing", "cleared", "another identity", "another call"],
)
def test_a_checkpointed_call_has_the_same_gradients_whatever_comes_after_it(
    after: Callable[[Injected], None],
) -> None:
    want, found = gradients("sd15", checkpointing=False), gradients("sd15", checkpointing=True, after=after)
    assert "tokens" in want
    for name in want:
        assert want[name].any(), name
    require_same_gradients(found, want)


@pytest.mark.parametrize("rescale", [False, True])
def test_it_acts_and_learns_under_autocast(unet: Any, adapter: Adapter, rescale: bool) -> None:
    injected = inject(unet, adapter)
    person = tokens().requires_grad_()
    injected.set_identity(person, rescale=rescale)
    want = predict(unet)
    tensors = {**trainable(adapter), "tokens": person}
    loss_of(unet).backward()
    exact = {name: t.grad.clone() for name, t in tensors.items() if t.grad is not None}
    for tensor in tensors.values():
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(predict(unet), want) < 0.03
        loss = loss_of(unet)
    loss.backward()
    assert exact.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == torch.float32
        assert torch.cosine_similarity(tensor.grad.flatten(), exact[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("narrow", ["unet", "layers", "tokens"])
def test_any_part_may_be_in_half_precision(unet: Any, adapter: Adapter, narrow: str) -> None:
    injected = inject(unet, adapter)
    person = tokens()
    injected.set_identity(person)
    want, given = predict(unet), inputs("sd15")
    if narrow == "unet":
        unet.to(torch.bfloat16)
        given = {key: t.bfloat16() if t.is_floating_point() else t for key, t in given.items()}
    elif narrow == "layers":
        adapter.layers.bfloat16()
    else:
        person = person.bfloat16()
    with injected.identity(person), torch.no_grad():
        out = unet(**given).sample
    assert out.dtype == given["sample"].dtype
    assert relative(out, want) < 0.03


# --- observing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
def test_an_observer_is_told_the_norms_at_each_site(kind: str, rescale: bool) -> None:
    """Of what is added to the text's attention, with its strength, and of the text's attention."""
    unet, adapter = diffusers_unet(kind), tiny_uniid(CONFIGS[kind])
    injected = inject(unet, adapter)
    want: dict[int, tuple[float, float]] = {}
    for site in attention_sites(unet.state_dict()):
        layer = unet.get_submodule(site.diffusers_module)
        parts: dict[str, Tensor] = {}
        for name in ("to_q", "to_k", "to_v"):

            def note(_: Any, args: Any, output: Tensor, name: str = name, parts: Any = parts) -> None:
                parts[name] = output

            layer.get_submodule(name).register_forward_hook(note)

        def given(_: Any, args: Any, site: Any = site, layer: Any = layer, parts: Any = parts) -> None:
            text = attention(parts["to_q"], parts["to_k"], parts["to_v"], layer.heads)
            want[site.index] = (float((args[0] - text).norm()), float(text.norm()))

        layer.to_out[0].register_forward_pre_hook(given)
    with injected.identity(tokens(2, kind), torch.tensor([0.0, 0.7]), rescale=rescale):
        unobserved = predict(unet, kind)
        told = observed(injected)
        assert torch.equal(predict(unet, kind), unobserved)
    assert sorted(number for number, *_ in told) == sorted(want)
    for number, added, base in told:
        assert (float(added), float(base)) == pytest.approx(want[number], rel=1e-3)
        assert float(added) > 0.01


def test_a_small_strength_is_observed_exactly_in_half_precision(unet: Any, adapter: Adapter) -> None:
    """The sum with the text's attention would have lost it."""
    injected = inject(unet.to(torch.bfloat16), adapter)
    given = {key: t.bfloat16() if t.is_floating_point() else t for key, t in inputs("sd15").items()}
    told = observed(injected)
    for strength in (1.0, 1e-4):
        with injected.identity(tokens(), strength), torch.no_grad():
            unet(**given)
    count = len(injected.sites)
    (first, large, _), (again, small, _) = told[0], told[count]  # the sites behind it see another stream
    assert first == again
    assert float(small / large) == pytest.approx(1e-4, rel=1e-2)


def test_a_checkpointed_call_is_told_once_and_learns_the_same() -> None:
    told: list[tuple[int, Tensor, Tensor]] = []

    def run(observe: bool) -> dict[str, Tensor]:
        unet, adapter = diffusers_unet("sd15").train(), tiny_uniid(CONFIGS["sd15"])
        parameters = trainable(adapter)
        unet.enable_gradient_checkpointing()
        injected = inject(unet, adapter)
        injected.set_identity(tokens())
        if observe:
            injected.observe(lambda *given: told.append(given))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(unet)
        loss.backward()
        assert not told or sorted(number for number, *_ in told) == sorted(injected.sites)
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}

    want, found = run(observe=False), run(observe=True)
    assert told
    assert all(norm.shape == () and not norm.requires_grad for _, *norms in told for norm in norms)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_observing_waits_for_no_device(unet: Any, adapter: Adapter) -> None:
    require_no_waiting(unet, adapter, tokens(), torch.tensor([0.5, 1.0]), rescale=True)


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_ejecting_leaves_no_trace_twice_in_a_row(kind: str) -> None:
    unet, adapter = diffusers_unet(kind), tiny_uniid(CONFIGS[kind])
    before = AsItWas(unet, kind)
    for _ in range(2):
        with inject(unet, adapter) as injected:
            assert traces(unet) != before.traces
            injected.set_identity(tokens(1, kind))
            assert not torch.equal(predict(unet, kind), before.base)
        before.require()
        with pytest.raises(InputError, match="ejected; inject it again"):
            injected.set_identity(tokens(1, kind))


@pytest.mark.parametrize("place", ["attn2", "attn2.to_k", "attn2.to_out.0", "ff"])
def test_an_exception_inside_a_call_leaves_no_trace(unet: Any, adapter: Adapter, place: str) -> None:
    traced = traces(unet)
    injected = inject(unet, adapter)
    injected.set_identity(tokens())
    want = predict(unet)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    queries: list[weakref.ref[Tensor]] = []

    hook = block.attn2.to_q.register_forward_hook(lambda module, args, out: queries.append(weakref.ref(out)))
    with failing(block.get_submodule(place), KeyError(place)), pytest.raises(KeyError, match=place):
        predict(unet)
    hook.remove()
    gc.collect()
    assert all(reference() is None for reference in queries), "the failed call's query is kept"
    assert torch.equal(predict(unet), want)
    injected.eject()
    assert traces(unet) == traced
