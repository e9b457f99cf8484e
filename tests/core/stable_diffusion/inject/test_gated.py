"""IDAdapter injected into a diffusers UNet: it acts as asked, and leaves without a trace."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idadapter_core.adapter import Adapter, initial_adapter
from idadapter_core.errors import InputError
from idadapter_core.mechanisms.deltas import Place
from idadapter_core.sites import attention_sites
from idadapter_core.stable_diffusion.inject import Injected, eject, inject
from tests.core.stable_diffusion.inject.checks import AsItWas
from tests.core.stable_diffusion.inject.gated import COUNT, bias, tokens
from tests.tiny.diffusers_unet import (
    diffusers_unet,
    failing,
    inputs,
    loss_of,
    predict,
    relative,
    traces,
    trainable,
)
from tests.tiny.idadapter import CONFIGS, tiny_idadapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter() -> Adapter:
    return tiny_idadapter(CONFIGS["sd15"])


# --- acting ----------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_no_bit(kind: str) -> None:
    unet = diffusers_unet(kind)
    base = predict(unet, kind)
    injected = inject(unet, initial_adapter(CONFIGS[kind], "fresh"))
    assert torch.equal(predict(unet, kind), base)
    with injected.identity(tokens(), bias=bias(), rows=torch.tensor([True, False])):
        assert torch.equal(predict(unet, kind), base)
        unet.train().requires_grad_(True)
        assert torch.equal(unet(**inputs(kind)).sample, base)


def test_a_fresh_adapter_can_open_at_every_site(kind: str) -> None:
    """Each gate and each delta has a way to the picture, and while the gates are closed nothing behind them has."""
    unet, adapter = diffusers_unet(kind), initial_adapter(CONFIGS[kind], "fresh")
    parameters = trainable(adapter)
    injected = inject(unet, adapter)
    with injected.identity(tokens()):
        loss_of(unet, kind).backward()
    moved = {
        name for name, parameter in parameters.items() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {name for name in parameters if "gate_" in name or name.startswith("deltas.")}
    assert len(moved) == 4 * len(attention_sites(unet.state_dict()))


def test_each_gate_sits_between_self_attention_and_cross_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given what the block would go on with, and the block goes on with what it gives."""
    unet, adapter = diffusers_unet(kind), tiny_idadapter(CONFIGS[kind])
    sites = attention_sites(unet.state_dict())
    given: dict[int, Tensor] = {}
    gave: dict[int, Tensor] = {}
    went_on: dict[int, Tensor] = {}

    def note(number: int) -> tuple[Any, Any]:
        residual = adapter.layers.gates[str(number)].residual

        def gate(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            added: Tensor = residual(y, *args, **kwargs)
            given[number], gave[number] = y.clone(), y + added
            return added

        def norm(module: nn.Module, args: Any) -> None:
            went_on[number] = args[0].clone()

        return gate, norm

    for site in sites:
        at_gate, at_norm = note(site.index)
        monkeypatch.setattr(adapter.layers.gates[str(site.index)], "residual", at_gate)
        block = unet.get_submodule(site.diffusers_module.removesuffix(".attn2"))
        block.norm2.register_forward_pre_hook(at_norm)
    injected = inject(unet, adapter)
    with injected.identity(tokens()):
        predict(unet, kind)
        assert given.keys() == {site.index for site in sites}
        for number, went in went_on.items():
            torch.testing.assert_close(went, gave[number])
            assert relative(went, given[number]) > 0.01
        for parameter in adapter.layers.parameters():
            parameter.data.zero_()
        predict(unet, kind)
        for number, went in went_on.items():
            assert torch.equal(went, given[number])


def test_deltas_are_what_merged_weights_are(kind: str) -> None:
    """With an identity or without, for all rows, as ComfyUI patches them into the weights."""
    unet, adapter = diffusers_unet(kind), tiny_idadapter(CONFIGS[kind], gate=0.0)
    merged = diffusers_unet(kind)
    for site in attention_sites(unet.state_dict()):
        for name in ("to_k", "to_v"):
            delta = adapter.mechanisms.deltas[Place(site.index, f"attn2.{name}")]
            merged.get_submodule(f"{site.diffusers_module}.{name}").weight.data += 0.7 * delta.weight
    want = predict(merged, kind)
    assert (want - predict(unet, kind)).abs().max() > 0.01
    injected = inject(unet, adapter)
    with injected.identity(None, strength=0.7):
        torch.testing.assert_close(predict(unet, kind), want, atol=1e-5, rtol=0)
    with injected.identity(tokens(), rows=torch.tensor([False, True]), strength=0.7):
        torch.testing.assert_close(predict(unet, kind), want, atol=1e-5, rtol=0)


def test_without_an_identity_deltas_act_as_trained(unet: Any, adapter: Adapter) -> None:
    base = predict(unet)
    injected = inject(unet, adapter)
    plain = predict(unet)
    assert not torch.equal(plain, base)
    with injected.identity(tokens(), strength=0.5):
        assert not torch.equal(predict(unet), plain)
    assert torch.equal(predict(unet), plain), "the identity was not cleared"
    with pytest.raises(KeyError), injected.identity(tokens()):
        raise KeyError
    assert torch.equal(predict(unet), plain), "the identity was not cleared after an error"
    injected.set_identity(tokens())
    with_identity = predict(unet)
    assert not torch.equal(with_identity, plain)
    assert torch.equal(predict(unet), with_identity)
    injected.set_identity(None)
    assert torch.equal(predict(unet), plain)


def test_strength_0_is_no_adapter(unet: Any, adapter: Adapter) -> None:
    base = predict(unet)
    injected = inject(unet, adapter)
    with injected.identity(tokens(), bias=bias(), strength=0.0):
        assert torch.equal(predict(unet), base)
    with injected.identity(None, strength=0.0):
        assert torch.equal(predict(unet), base)


def test_strength_scales_gates_and_deltas(unet: Any, adapter: Adapter) -> None:
    """To first order: a tenth of a small strength changes a tenth as much."""
    base = predict(unet)
    injected = inject(unet, adapter)

    def change(strength: float, given: Tensor | None) -> Tensor:
        with injected.identity(given, strength=strength):
            return predict(unet) - base

    for given in (tokens(), None):
        small, smaller = change(0.02, given), change(-0.002, given)
        assert (small / -10 - smaller).norm() < 0.1 * smaller.norm()


def test_gates_are_read_at_each_call(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    with injected.identity(tokens()):
        before = predict(unet)
        for name, parameter in adapter.layers.named_parameters():
            if "gate_" in name:
                parameter.data.zero_()
        closed = predict(unet)
    assert not torch.equal(closed, before)
    assert torch.equal(closed, predict(unet))


def test_a_bias_of_log_2_counts_a_token_twice(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    twice = torch.cat([tokens(), tokens()[:, -1:]], dim=1)
    with injected.identity(twice):
        want = predict(unet)
    logits = torch.zeros(COUNT)
    logits[-1] = torch.tensor(2.0).log()
    with injected.identity(tokens(), bias=logits):
        torch.testing.assert_close(predict(unet), want, atol=1e-5, rtol=0)
    with injected.identity(tokens()):
        assert (predict(unet) - want).abs().max() > 1e-4


# --- rows ------------------------------------------------------------------------------------------------------------


def test_dropped_rows_are_bit_equal_to_no_adapter() -> None:
    unet, adapter = diffusers_unet("sdxl"), tiny_idadapter(CONFIGS["sdxl"], delta=0.0)
    base = predict(unet, "sdxl", 3)
    injected = inject(unet, adapter)
    with injected.identity(tokens()):
        everyone = predict(unet, "sdxl", 3)
    with injected.identity(tokens(), bias=None, rows=torch.tensor([False, True, False])):
        out = predict(unet, "sdxl", 3)
    assert torch.equal(out[[0, 2]], base[[0, 2]])
    assert (out[1] - base[1]).abs().max() > 0.01
    torch.testing.assert_close(out[1], everyone[1], atol=1e-5, rtol=0)
    with injected.identity(tokens(), rows=torch.zeros(3, dtype=torch.bool)):
        assert torch.equal(predict(unet, "sdxl", 3), base)
    with injected.identity(tokens(), rows=torch.ones(3, dtype=torch.bool)):
        assert torch.equal(predict(unet, "sdxl", 3), everyone)


@pytest.mark.parametrize("kept", [[True, True, True], [True, False, True]])
def test_each_row_gets_its_own_tokens_alone(unet: Any, adapter: Adapter, kept: list[bool]) -> None:
    injected = inject(unet, adapter)
    people = tokens(3, "people")
    rows = torch.tensor(kept)
    with injected.identity(people, bias=bias(), rows=rows):
        together = predict(unet, rows=3)
    for row in (0, 2):
        with injected.identity(people[row : row + 1], bias=bias(), rows=rows):
            torch.testing.assert_close(predict(unet, rows=3)[row], together[row], atol=1e-5, rtol=0)
        others = people.clone()
        others[[number for number in range(3) if number != row]] += 1
        with injected.identity(others, bias=bias(), rows=rows):
            changed = predict(unet, rows=3)
        assert torch.equal(changed[row], together[row])
        assert not torch.equal(changed[2 - row], together[2 - row])


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_ejecting_leaves_no_trace_twice_in_a_row(kind: str) -> None:
    unet, adapter = diffusers_unet(kind), tiny_idadapter(CONFIGS[kind])
    before = AsItWas(unet, kind)
    weights = {key: tensor.clone() for key, tensor in adapter.layers.state_dict().items()}
    for leave in (Injected.eject, lambda injected: eject(injected.unet)):
        injected = inject(unet, adapter)
        assert traces(unet) != before.traces
        assert unet.state_dict().keys() == before.state.keys()
        with injected.identity(tokens()):
            assert not torch.equal(predict(unet, kind), before.base)
        leave(injected)
        before.require()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in adapter.layers.state_dict().items())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("place", ["attn1", "norm2", "attn2", "ff"])
def test_an_exception_inside_a_call_leaves_no_trace(unet: Any, adapter: Adapter, place: str) -> None:
    traced, base = traces(unet), predict(unet)
    injected = inject(unet, adapter)
    injected.set_identity(tokens())
    want = predict(unet)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    given: list[weakref.ref[Tensor]] = []

    hook = block.register_forward_pre_hook(lambda module, args: given.append(weakref.ref(args[0])))
    with failing(block.get_submodule(place), KeyError(place)), pytest.raises(KeyError, match=place):
        predict(unet)
    hook.remove()
    gc.collect()
    assert [reference() for reference in given] == [None], "the failed call's tensors are kept"
    assert torch.equal(predict(unet), want)
    injected.eject()
    injected.eject()
    assert traces(unet) == traced
    assert torch.equal(predict(unet), base)


def test_ejecting_nothing_is_harmless(unet: Any, adapter: Adapter) -> None:
    traced = traces(unet)
    eject(unet)
    injected = inject(unet, adapter)
    eject(unet)
    eject(unet)
    injected.eject()
    assert traces(unet) == traced
    with pytest.raises(InputError, match="ejected; inject it again"):
        injected.set_identity(tokens())


def test_a_copy_of_the_unet_has_an_adapter_of_its_own(unet: Any, adapter: Adapter) -> None:
    traced, base = traces(unet), predict(unet)
    injected = inject(unet, adapter)
    injected.set_identity(tokens())
    want = predict(unet)
    twin = copy.deepcopy(unet)
    injected.set_identity(None, strength=0.0)
    assert torch.equal(predict(twin), want)
    assert torch.equal(predict(unet), base)
    eject(twin)
    assert traces(twin) == traced
    injected.set_identity(tokens())
    assert torch.equal(predict(unet), want)


def test_what_callers_hand_to_attention_still_arrives(unet: Any, adapter: Adapter) -> None:
    """And nothing of ours: diffusers would warn of it at every call."""
    seen: list[dict[str, Any]] = []
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    attention.register_forward_pre_hook(look, with_kwargs=True)
    injected = inject(unet, adapter)
    injected.set_identity(tokens())
    given = inputs("sd15")
    mask = torch.ones(1)  # quietly accepted by every processor
    plain = predict(unet)
    with torch.no_grad():
        named = unet(**given, cross_attention_kwargs={"ip_adapter_masks": mask}).sample
        placed = unet(*given.values(), None, None, None, {"ip_adapter_masks": mask}).sample
    assert torch.equal(named, plain)
    assert torch.equal(placed, plain)
    ours = [set(kwargs) - {"encoder_hidden_states", "attention_mask"} for kwargs in seen]
    assert ours == [set(), {"ip_adapter_masks"}, {"ip_adapter_masks"}]
