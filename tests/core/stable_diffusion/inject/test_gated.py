"""IDAdapter injected into a diffusers UNet: it acts as asked, learns, and leaves without a trace."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idadapter_core.adapter import Adapter, initial_adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.mechanisms.deltas import Place
from idadapter_core.sites import attention_sites
from idadapter_core.stable_diffusion.inject import Injected, eject, inject
from tests.core.stable_diffusion.inject.checks import (
    AsItWas,
    bad_tokens,
    require_derivatives,
    require_gradients,
    require_no_waiting,
    require_one_device,
    require_refused,
    require_same_gradients,
    require_three_rows,
)
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
from tests.tiny.idadapter import CONFIGS, tiny_idadapter

COUNT = 5  # identity tokens


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(rows: int = 1, name: str = "person") -> Tensor:
    shape = (rows, COUNT, CONFIGS["sd15"].vision_width)
    return recipe.value(0, f"unet.{name}", shape)


def bias() -> Tensor:
    return torch.linspace(-1, 1, COUNT)


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


# --- training --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_loss(kind: str) -> None:
    """Along a random direction of all parameters and the tokens, in double precision."""
    unet, adapter = diffusers_unet(kind).double(), tiny_idadapter(CONFIGS[kind])
    adapter.layers.double()
    parameters = trainable(adapter)
    person = tokens(2).double().requires_grad_()
    injected = inject(unet, adapter)
    given = in_double(inputs(kind))
    target = recipe.value(0, "unet.target", (2, 4, 8, 8)).double()
    everything = {**parameters, "tokens": person}

    def loss() -> Tensor:
        with injected.identity(person, bias=bias(), rows=torch.tensor([True, False]), strength=0.8):
            out: Tensor = unet(**given).sample
        return (out * target).sum()

    require_gradients(unet, loss, everything, dropped=1)
    groups: list[Callable[[str], bool]] = [
        lambda name: "gate_" in name,
        lambda name: name.startswith("deltas."),
        lambda name: name == "tokens",
        lambda name: name.startswith("gates.") and "gate_" not in name,
    ]
    # The tanh of a gate is taken in single precision.
    require_derivatives(loss, everything, groups, step=1e-4, tolerance=2e-2)


def gradients(
    kind: str, checkpointing: bool, after: Callable[[Injected], None] = lambda injected: None
) -> dict[str, Tensor]:
    """Gradients of all parameters and the tokens; `after` runs between the forward and the backward pass."""
    unet, adapter = diffusers_unet(kind).train(), tiny_idadapter(CONFIGS[kind])
    parameters = trainable(adapter)
    person = tokens(2).requires_grad_()
    injected = inject(unet, adapter)
    injected.set_identity(person, bias=bias(), rows=torch.tensor([False, True]), strength=0.8)
    return gradients_of(unet, kind, {**parameters, "tokens": person}, checkpointing, lambda: after(injected))


def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    want = gradients(kind, checkpointing=False)
    assert "tokens" in want
    assert any(gradient.any() for gradient in want.values())
    found = gradients(kind, checkpointing=True)
    require_same_gradients(found, want)


@pytest.mark.parametrize(
    "after",
    [
        lambda injected: injected.set_identity(None),
        lambda injected: injected.set_identity(tokens(1, "another"), strength=0.3),
        lambda injected: predict(injected.unet),
    ],
    ids=["cleared", "another identity", "another call"],
)
def test_a_checkpointed_call_keeps_what_was_set_when_it_began(after: Callable[[Injected], None]) -> None:
    want, found = gradients("sd15", checkpointing=False), gradients("sd15", checkpointing=True, after=after)
    require_same_gradients(found, want)


def test_a_few_steps_of_training_open_the_gates_and_lower_the_loss(unet: Any) -> None:
    adapter = initial_adapter(CONFIGS["sd15"], "training")
    injected = inject(unet, adapter)
    optimizer = torch.optim.AdamW(trainable(adapter).values(), lr=1e-2)
    target = recipe.value(2, "unet.target", (2, 4, 8, 8))
    losses = []
    with injected.identity(tokens()):
        for _ in range(5):
            optimizer.zero_grad()
            loss = (unet(**inputs("sd15")).sample - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert all(any(pair) for pair in adapter.layers.gates.openings().values())
    assert len(adapter.layers.key_value_deltas()) == 2 * len(CONFIGS["sd15"].site_widths)


def test_it_acts_and_learns_under_autocast(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    injected.set_identity(tokens(), bias=bias())
    want = predict(unet)
    parameters = trainable(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(unet)
        loss = loss_of(unet)
    assert relative(rounded, want) < 0.03
    loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    found = {
        name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
    }
    adapter.layers.zero_grad()
    loss_of(unet).backward()
    cosine = torch.cosine_similarity(
        torch.cat([t.flatten() for t in found.values()]),
        torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]),
        dim=0,
    )
    assert cosine > 0.99


def test_a_narrow_adapter_needs_autocast_in_a_wide_unet(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    injected.set_identity(tokens(), bias=bias())
    want = predict(unet)
    adapter.layers.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(predict(unet), want) < 0.03
    with pytest.raises(
        MismatchError, match=r"UNet computes in torch.float32.* in torch.bfloat16. Convert the"
    ):
        predict(unet)


def test_a_wider_adapter_acts_in_a_narrow_unet(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    injected.set_identity(tokens(), bias=bias(), rows=torch.tensor([True, False]))
    want = predict(unet)
    unet.to(torch.bfloat16)
    given = {k: t.bfloat16() if t.is_floating_point() else t for k, t in inputs("sd15").items()}
    with torch.no_grad():
        out = unet(**given).sample
    assert out.dtype == torch.bfloat16
    assert relative(out, want) < 0.03


# --- observing -------------------------------------------------------------------------------------------------------


def test_an_observer_is_told_the_norms_at_each_gate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows with the identity: what the gate adds, and what it is added to."""
    unet, adapter = diffusers_unet(kind), tiny_idadapter(CONFIGS[kind])
    want: dict[int, tuple[float, float]] = {}

    def note(number: int) -> Any:
        residual = adapter.layers.gates[str(number)].residual

        def gate(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            added: Tensor = residual(y, *args, **kwargs)
            want[number] = (float(added.norm()), float(y.norm()))
            assert len(y) == 1
            return added

        return gate

    injected = inject(unet, adapter)
    for number in injected.sites:
        monkeypatch.setattr(adapter.layers.gates[str(number)], "residual", note(number))
    with injected.identity(tokens(), rows=torch.tensor([False, True]), strength=0.5):
        unobserved = predict(unet, kind)
        found = observed(injected)
        assert torch.equal(predict(unet, kind), unobserved)
    assert len(found) == len(want) == len(attention_sites(unet.state_dict()))
    for number, added, base in found:
        assert (float(added), float(base)) == pytest.approx(want[number], rel=1e-4)
        assert float(added) > 0.01


def test_an_observer_is_told_only_where_an_identity_acts_and_while_it_is_set(
    unet: Any, adapter: Adapter
) -> None:
    injected = inject(unet, adapter)
    found = observed(injected)
    predict(unet)
    with injected.identity(tokens(), strength=0.0):
        predict(unet)
    with injected.identity(tokens(), rows=torch.tensor([False, False])):
        predict(unet)
    assert not found
    injected.set_identity(tokens())
    for calls in (1, 2):
        predict(unet)
        assert sorted(number for number, *_ in found) == sorted(calls * injected.sites)
    injected.observe(None)
    predict(unet)
    assert len(found) == 2 * len(injected.sites)
    injected.eject()
    with pytest.raises(InputError, match="ejected"):
        injected.observe(None)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_checkpointed_call_is_told_once_and_learns_the_same(autocast: bool) -> None:
    unet, adapter = diffusers_unet("sd15").train(), tiny_idadapter(CONFIGS["sd15"])
    parameters = trainable(adapter)
    unet.enable_gradient_checkpointing()
    injected = inject(unet, adapter)
    injected.set_identity(tokens(), bias=bias())

    def learn() -> dict[str, Tensor]:
        injected.layers.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(unet)
        loss.backward()
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    want = learn()
    told = observed(injected)
    found = learn()
    assert sorted(number for number, *_ in told) == sorted(injected.sites)
    assert all(norm.shape == () and not norm.requires_grad for _, *norms in told for norm in norms)
    assert found.keys() == want.keys() == parameters.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_observing_waits_for_no_device(unet: Any, adapter: Adapter) -> None:
    require_no_waiting(unet, adapter, tokens(), rows=torch.tensor([True, False]))


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


# --- refusing --------------------------------------------------------------------------------------------------------


def test_a_unet_of_another_family_is_refused_with_both_names(unet: Any) -> None:
    traced = traces(unet)
    other = tiny_idadapter(CONFIGS["sdxl"])
    both = "11 attention sites, text width 128.* UNet2DConditionModel: .*7 attention sites, text width 64"
    with pytest.raises(MismatchError, match=f"tiny 0 was made for .*{both}"):
        inject(unet, other)
    assert traces(unet) == traced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_width": 96}, "text width 96.*text width 64"),
        ({"site_widths": (64,) * 7}, "The two differ in the widths of their layers"),
    ],
)
def test_a_unet_of_other_sizes_is_refused(unet: Any, changes: dict[str, Any], message: str) -> None:
    traced = traces(unet)
    adapter = tiny_idadapter(replace(CONFIGS["sd15"], **changes))
    with pytest.raises(MismatchError, match=message):
        inject(unet, adapter)
    assert traces(unet) == traced


def test_injecting_twice_is_refused(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    traced = traces(unet)
    with pytest.raises(MismatchError, match="injected into this UNet2DConditionModel already"):
        inject(unet, adapter)
    assert traces(unet) == traced
    injected.eject()
    inject(unet, adapter)


class Wrapper(nn.Module):
    """What a training script may wrap around a model."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_wrapper_or_another_model_is_refused(unet: Any, adapter: Adapter) -> None:
    traced = traces(unet)
    for thing in (Wrapper(unet), nn.Linear(2, 2)):
        with pytest.raises(MismatchError, match="no UNet2DConditionModel of diffusers.* not a pipeline"):
            inject(thing, adapter)
    assert traces(unet) == traced


class OtherBlock(nn.Module):
    """A block with the same attention in another order."""

    def __init__(self, block: Any):
        super().__init__()
        self.attn1, self.attn2 = block.attn1, block.attn2


@pytest.mark.parametrize("where", ["norm", "class", "positions", "fuser"])
def test_blocks_of_other_kinds_are_refused(unet: Any, adapter: Adapter, where: str) -> None:
    blocks = unet.mid_block.attentions[0].transformer_blocks
    if where == "norm":
        blocks[0].norm_type = "ada_norm_zero"
    elif where == "class":
        blocks[0] = OtherBlock(blocks[0])
    elif where == "positions":
        blocks[0].pos_embed = nn.Identity()
    else:
        blocks[0].fuser = nn.Identity()
    traced = traces(unet)
    expected = {
        "norm": "'ada_norm_zero', not 'layer_norm'",
        "class": "is a OtherBlock, not a BasicTransformerBlock",
        "positions": "position embeddings",
        "fuser": "GLIGEN",
    }[where]
    with pytest.raises(MismatchError, match=f"mid_block.attentions.0.transformer_blocks.0 .*{expected}"):
        inject(unet, adapter)
    assert traces(unet) == traced


def test_a_unet_without_self_attention_is_refused(adapter: Adapter) -> None:
    with pytest.raises(MismatchError, match="has not self-attention followed by cross-attention"):
        inject(diffusers_unet("sd15", only_cross_attention=True), adapter)


def test_fused_projections_are_refused_before_and_after(unet: Any, adapter: Adapter) -> None:
    unet.fuse_qkv_projections()
    with pytest.raises(MismatchError, match=r"fused.*unfuse_qkv_projections\(\)"):
        inject(unet, adapter)
    unet.unfuse_qkv_projections()
    inject(unet, adapter)
    want = predict(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(MismatchError, match=r"ran without calling attn2.to_k, attn2.to_v.*Unfuse"):
        predict(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(predict(unet), want)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        *bad_tokens(tokens()),
        ({"bias": torch.zeros(1, COUNT)}, InputError, r"bias must have one value for each of the 5 tokens"),
        ({"bias": torch.zeros(COUNT - 1)}, InputError, r"bias must have .*got shape \(4,\)"),
        ({"rows": torch.ones(2)}, InputError, "rows must be a bool tensor"),
        ({"rows": torch.ones(2, 1, dtype=torch.bool)}, InputError, "rows must be a bool tensor"),
        ({"tokens": tokens(3), "rows": torch.ones(2).bool()}, InputError, "rows has 2 entries, tokens 3"),
        ({"tokens": None, "rows": torch.ones(2).bool()}, InputError, "bias and rows belong to tokens"),
        ({"tokens": None, "bias": torch.zeros(COUNT)}, InputError, "bias and rows belong to tokens"),
        ({"strength": float("nan")}, InputError, "strength must be a finite number, got nan"),
    ],
)
def test_bad_identities_are_refused(
    unet: Any, adapter: Adapter, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    require_refused(inject(unet, adapter), tokens(), given, error, message)


@pytest.mark.parametrize(
    "given", [{"tokens": tokens(3)}, {"tokens": tokens(), "rows": torch.tensor([True, True, False])}]
)
def test_a_call_with_other_rows_is_refused(unet: Any, adapter: Adapter, given: dict[str, Any]) -> None:
    require_three_rows(inject(unet, adapter), given)


def test_an_adapter_elsewhere_is_refused(unet: Any, adapter: Adapter) -> None:
    require_one_device(unet, adapter, tokens())
