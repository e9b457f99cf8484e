"""IDAdapter in a diffusers UNet: it learns, and tells an observer how strongly it acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.adapter import Adapter, initial_adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.sites import attention_sites
from idadapter_core.stable_diffusion.inject import Injected, inject
from tests.core.stable_diffusion.inject.checks import (
    require_derivatives,
    require_gradients,
    require_no_waiting,
    require_same_gradients,
)
from tests.core.stable_diffusion.inject.gated import bias, tokens
from tests.golden import recipe
from tests.tiny.diffusers_unet import (
    diffusers_unet,
    gradients_of,
    in_double,
    inputs,
    loss_of,
    observed,
    predict,
    relative,
    trainable,
)
from tests.tiny.idadapter import CONFIGS, tiny_idadapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter() -> Adapter:
    return tiny_idadapter(CONFIGS["sd15"])


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
