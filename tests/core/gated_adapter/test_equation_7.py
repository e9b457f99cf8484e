"""Gated adapters against Eq. 7: fresh ones, closed gates, masks and strengths."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from idadapter_core.mechanisms.deltas import Place, nonzero_deltas
from idadapter_core.mechanisms.gated import GatedAdapter, GateIdentity
from idadapter_core.methods.idadapter import IDAdapterLayers
from tests.core.gated_adapter.gates import (
    ATTENTION,
    CHANNELS,
    DTYPES,
    FEED_FORWARD,
    LENGTH,
    TOKEN_WIDTH,
    TOKENS,
    assert_close,
    draw,
    e_r,
    equation_7,
    fresh,
    identity,
    opened,
    stream,
)
from tests.tiny.idadapter import CONFIGS, idadapter_state

# --- Eq. 7 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("rows", [1, 2])
def test_it_computes_equation_7_and_a_gated_feed_forward(rows: int, beta: float, biased: bool) -> None:
    gate, tokens = opened(), e_r(rows=rows)
    bias = draw("bias", TOKENS) if biased else None
    out = gate(stream(), [identity(gate, tokens, beta, bias)])
    assert_close(out, equation_7(gate, stream(), [(tokens, beta)], bias))


def test_projecting_e_r_apart_equals_the_projection_of_the_concatenation() -> None:
    gate, tokens = opened(), e_r(rows=2)
    together = gate.to_qkv(gate.norm1(torch.cat([stream(), gate.linear(tokens)], dim=1)))
    keys, values = gate.project(tokens)
    assert keys.shape == values.shape == (2, TOKENS, CHANNELS)
    assert_close(keys, together[:, LENGTH:, CHANNELS : 2 * CHANNELS])
    assert_close(values, together[:, LENGTH:, 2 * CHANNELS :])


def test_several_people_add_up_and_their_order_does_not_matter() -> None:
    gate = opened()
    people = [(e_r("a"), 0.5), (e_r("b"), 1.2), (e_r("c"), -0.3)]
    expected = equation_7(gate, stream(), people)
    for order in (people, people[::-1]):
        assert_close(gate(stream(), [identity(gate, tokens, beta) for tokens, beta in order]), expected)


def test_an_identity_twice_at_half_strength_equals_it_once() -> None:
    gate = opened()
    once = gate(stream(), [identity(gate, e_r())])
    assert_close(gate(stream(), [identity(gate, e_r(), 0.5)] * 2), once)
    assert_close(gate(stream(), [identity(gate, e_r(), beta) for beta in (0.2, 1.3, -0.5)]), once)


def test_strength_zero_is_exactly_the_stream() -> None:
    gate = opened()
    assert torch.equal(gate(stream(), [identity(gate, e_r(), 0.0)]), stream())
    assert torch.equal(gate(stream(), [identity(gate, e_r(), torch.zeros(1, LENGTH, 1))]), stream())


def test_a_mask_is_a_strength_for_each_token() -> None:
    gate = opened()
    mask = torch.linspace(0, 1, LENGTH).double()[None, :, None]
    out = gate(stream(), [identity(gate, e_r(), mask)])
    assert_close(out, equation_7(gate, stream(), [(e_r(), mask)]))
    half = torch.ones(1, LENGTH, 1).double()
    half[:, 5:] = 0
    everywhere = gate(stream(), [identity(gate, e_r())])
    inside = gate(stream(), [identity(gate, e_r(), half)])
    assert_close(inside[:, :5], everywhere[:, :5])
    assert torch.equal(inside[:, 5:], stream()[:, 5:])
    by_row = torch.tensor([1.0, 0.0]).double()[:, None, None]
    rows = gate(stream(), [identity(gate, e_r(), by_row)])
    assert_close(rows[0], everywhere[0])
    assert torch.equal(rows[1], stream()[1])


def test_two_people_with_masks_do_not_reach_into_each_other() -> None:
    gate = opened()
    left = torch.zeros(1, LENGTH, 1).double()
    left[:, :5] = 1
    both = gate(stream(), [identity(gate, e_r("a"), left), identity(gate, e_r("b"), 1 - left)])
    assert_close(both[:, :5], gate(stream(), [identity(gate, e_r("a"))])[:, :5])
    assert_close(both[:, 5:], gate(stream(), [identity(gate, e_r("b"))])[:, 5:])


@pytest.mark.parametrize(("attention", "feed_forward"), [(0.7, -0.4), (0.7, 0.0), (0.0, -0.4)])
@pytest.mark.parametrize("masked", [True, False])
def test_in_place_gives_the_same_and_only_when_asked(
    attention: float, feed_forward: float, masked: bool
) -> None:
    gate = opened(attention, feed_forward)
    strength = torch.linspace(0, 1, LENGTH).double()[None, :, None] if masked else 0.8
    people = [identity(gate, e_r("a"), strength), identity(gate, e_r("b"))]
    gates = (math.tanh(attention), math.tanh(feed_forward))
    y = stream()
    fresh_result = gate(y, people, gates=gates)
    assert torch.equal(y, stream())
    assert gate(y, people, gates=gates, inplace=True) is y
    assert torch.equal(y, fresh_result)
    assert not torch.equal(y, stream())


def test_gates_known_on_the_host_equal_the_parameters() -> None:
    gate = opened()
    people = [identity(gate, e_r())]
    known = (math.tanh(ATTENTION), math.tanh(FEED_FORWARD))
    torch.testing.assert_close(gate(stream(), people, gates=known), gate(stream(), people), atol=1e-6, rtol=0)
    assert not torch.allclose(gate(stream(), people, gates=(known[0], 0.0)), gate(stream(), people))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
def test_the_stream_keeps_its_dtype(dtype: torch.dtype, tolerance: float) -> None:
    exact = opened()
    expected = equation_7(exact, stream(), [(e_r(), 0.8)])
    gate = opened().to(dtype)
    mask = torch.full((1, LENGTH, 1), 0.8)  # fp32
    for strength in (0.8, mask):
        keys, values = gate.project(e_r().to(dtype))
        out = gate(stream().to(dtype), [GateIdentity(keys, values, None, strength)])
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=10 * tolerance, rtol=10 * tolerance)


def test_layers_come_from_the_host() -> None:
    class Linear(nn.Linear):
        pass

    class LayerNorm(nn.LayerNorm):
        pass

    layers = IDAdapterLayers(CONFIGS["sd15"], SimpleNamespace(Linear=Linear, LayerNorm=LayerNorm))
    for gate in layers.gates.values():
        assert {type(child) for child in gate.children()} == {Linear, LayerNorm}


# --- closed gates ----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_exactly_the_identity() -> None:
    gate = fresh().requires_grad_(False)
    assert torch.equal(gate(stream(), [identity(gate, e_r())]), stream())


@pytest.mark.parametrize(
    ("gates", "called"),
    [
        ((0.0, 0.0), set()),
        ((0.0, 0.5), {"norm2", "ff_in", "ff_out"}),
        ((0.5, 0.0), {"norm1", "to_qkv", "to_out"}),
        ((0.5, 0.5), {"norm1", "to_qkv", "to_out", "norm2", "ff_in", "ff_out"}),
    ],
)
def test_closed_gates_cost_nothing(gates: tuple[float, float], called: set[str]) -> None:
    gate, y, seen = opened(), stream(), set()
    people = [identity(gate, e_r())]
    for name, child in gate.named_children():
        child.register_forward_hook(lambda *_, name=name: seen.add(name))
    out = gate(y, people, gates=gates)
    assert seen == called
    assert (out is y) == (not called)
    assert torch.equal(y, stream())


def test_training_starts_at_the_gates() -> None:
    """At gates of 0 the stream is unchanged and only they have a gradient; once open, everything has."""
    gate = fresh()

    def gradients() -> dict[str, Tensor]:
        gate.zero_grad()
        out = gate(stream(), [identity(gate, e_r())])
        (out * draw("target", *out.shape).double()).sum().backward()
        found = {name: p.grad for name, p in gate.named_parameters()}
        assert all(grad is not None and grad.isfinite().all() for grad in found.values())
        return {name: grad for name, grad in found.items() if grad is not None}

    closed = {name for name, grad in gradients().items() if grad.any()}
    assert closed == {"gate_attention", "gate_feed_forward"}
    with torch.no_grad():
        gate.gate_attention.fill_(0.1)
        gate.gate_feed_forward.fill_(0.1)
    assert all(grad.any() for grad in gradients().values())


def test_gradients_reach_the_stream_and_e_r() -> None:
    gate = opened().requires_grad_(True)
    y, tokens = stream().requires_grad_(), e_r().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, tokens: gate(y, [identity(gate, tokens, 0.7), identity(gate, 2 * tokens, 0.2)]),
        (y, tokens),
        fast_mode=True,
    )


# --- all sites -------------------------------------------------------------------------------------------------------


def test_sites_are_numbered_as_in_checkpoints() -> None:
    layers = IDAdapterLayers(CONFIGS["sd15"])
    numbers = ["1", "3", "5", "7", "9", "11", "13"]
    assert list(layers.gates) == list(layers.deltas) == numbers
    widths = [gate.to_out.out_features for gate in layers.gates.values()]
    assert tuple(widths) == CONFIGS["sd15"].site_widths


def test_an_adapter_knows_its_gates_and_what_it_changed() -> None:
    config = CONFIGS["sd15"]
    state = idadapter_state(config, gate=0, delta=0)
    state["layers.gates.5.gate_attention"].fill_(0.6)
    state["layers.gates.7.gate_feed_forward"].fill_(-0.2)
    state["layers.deltas.3.to_v.weight"][2, 1] = 0.25
    layers = IDAdapterLayers(config)
    layers.load_state_dict({key.removeprefix("layers."): t for key, t in state.items() if "layers." in key})
    values = layers.gates.openings()
    assert list(values) == [1, 3, 5, 7, 9, 11, 13]
    assert values.pop(5) == (pytest.approx(math.tanh(0.6)), 0)
    assert values.pop(7) == (0, pytest.approx(math.tanh(-0.2)))
    assert set(values.values()) == {(0.0, 0.0)}
    deltas = layers.key_value_deltas()
    assert list(deltas) == [
        Place(number, layer) for number in (1, 3, 5, 7, 9, 11, 13) for layer in ("attn2.to_k", "attn2.to_v")
    ]
    assert list(nonzero_deltas(deltas)) == [Place(3, "attn2.to_v")]
    to_v = deltas[Place(3, "attn2.to_v")].weight
    assert to_v.shape == (config.site_widths[1], config.context_width)
    assert to_v.sum() == 0.25


# --- residuals and copies --------------------------------------------------------------------------------------------


def two_identities(gate: GatedAdapter, dtype: torch.dtype) -> list[GateIdentity]:
    pairs = [gate.project(draw(f"e_r {n}", 1, TOKENS, TOKEN_WIDTH).to(dtype)) for n in range(2)]
    mask = draw("mask", 1, LENGTH, 1).sigmoid().to(dtype)
    return [GateIdentity(*pairs[0], strength=0.6), GateIdentity(*pairs[1], strength=mask)]


@pytest.mark.parametrize("gates", [(0.5, -0.3), (0.5, 0.0), (0.0, -0.3), (0.0, 0.0)])
def test_the_residual_is_what_is_added(gates: tuple[float, float]) -> None:
    gate, x = opened().float(), draw("y", 2, LENGTH, CHANNELS)
    with torch.no_grad():
        people = two_identities(gate, torch.float32)
        added = gate.residual(x, people, gates=gates)
        torch.testing.assert_close(x + added, gate(x, people, gates=gates))
        torch.testing.assert_close(gate.residual(x, people), gate(x, people) - x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_residual_is_not_lost_in_the_rounding_of_the_stream(dtype: torch.dtype) -> None:
    """Normalized rescaling brings it to full size, and would bring the rounding to full size with it."""
    gate, x, closed = opened().float(), 3 * draw("y", 2, LENGTH, CHANNELS), (0.01, 0.01)
    with torch.no_grad():
        exact = gate.residual(x, two_identities(gate, torch.float32), gates=closed)
        half = gate.to(dtype)
        people = two_identities(half, dtype)
        found = half.residual(x.to(dtype), people, gates=closed).float()
        lost = (half(x.to(dtype), people, gates=closed) - x.to(dtype)).float()
    error, careless = ((r - exact).norm() / exact.norm() for r in (found, lost))
    assert error < 0.03
    assert careless > 3 * error
