"""IDAdapter's gated adapters against Eq. 7 written out, and what a fresh one, a closed gate, a mask and a strength mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idadapter_core.adapter import initial_adapter
from idadapter_core.attention import gated_self_attention, repeat_copies
from idadapter_core.mechanisms.deltas import Place, that_change
from idadapter_core.mechanisms.gated import GatedAdapter, GateIdentity
from idadapter_core.methods.idadapter import IDAdapterConfig, IDAdapterEncoder, IDAdapterLayers
from idadapter_core.methods.idadapter.encoder import initialise
from tests.golden import recipe
from tests.tiny.idadapter import CONFIGS, idadapter_state, tiny_idadapter, vision_features

HEADS, CHANNELS, LENGTH, TOKENS, TOKEN_WIDTH = 4, 32, 10, 6, 24
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ATTENTION, FEED_FORWARD = 0.7, -0.4  # gates of `opened`, before tanh


def draw(name: str, *shape: int) -> Tensor:
    return recipe.value(5, name, shape)


def textbook(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention head by head in float64: (B, N, C), (B, S, C), (B, S, C), bias (S,) of the logits."""
    width = query.shape[-1] // HEADS
    parts = []
    for part in (slice(head * width, (head + 1) * width) for head in range(HEADS)):
        q, k, v = (x[..., part].double() for x in (query, keys, values))
        logits = q @ k.transpose(1, 2) / math.sqrt(width)
        parts.append((logits if bias is None else logits + bias.double()).softmax(-1) @ v)
    return torch.cat(parts, dim=-1)


# --- attention over [y, E_r] -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("identities", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
def test_it_is_self_attention_over_both_with_the_rows_of_e_r_dropped(
    dtype: torch.dtype, tolerance: float, identities: int, biased: bool, trains: bool
) -> None:
    y = [draw(name, 3, LENGTH, CHANNELS).to(dtype) for name in ("q", "k", "v")]
    e_r = [draw(f"identity {name}", identities, TOKENS, CHANNELS).to(dtype) for name in ("q", "k", "v")]
    bias = draw("bias", TOKENS) if biased else None
    with torch.set_grad_enabled(trains):
        out = gated_self_attention(*y, *e_r[1:], HEADS, bias=bias)
    assert out.dtype == dtype
    both = [torch.cat([a, b.expand(3, -1, -1)], dim=1) for a, b in zip(y, e_r, strict=True)]
    logits = None if bias is None else torch.cat([torch.zeros(LENGTH), bias])
    expected = textbook(*both, logits)[:, :LENGTH]
    torch.testing.assert_close(out.double(), expected, atol=4 * tolerance, rtol=0)


@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_a_long_stream_is_no_different(biased: bool) -> None:
    """Where the host's CPU has no fast bf16 attention, the stream is worked on in parts."""
    length = 1100
    y = [draw(name, 1, length, CHANNELS).bfloat16() for name in ("q", "k", "v")]
    identity = [draw(f"identity {name}", 1, TOKENS, CHANNELS).bfloat16() for name in ("k", "v")]
    bias = draw("bias", TOKENS) + 5 if biased else None
    out = gated_self_attention(*y, *identity, HEADS, bias=bias)
    logits = None if bias is None else torch.cat([torch.zeros(length), bias])
    keys, values = (torch.cat(pair, dim=1) for pair in zip(y[1:], identity, strict=True))
    torch.testing.assert_close(out.double(), textbook(y[0], keys, values, logits), atol=8e-2, rtol=0)


def test_its_bias_is_the_log_of_how_often_a_token_stands_there() -> None:
    y = [draw(name, 2, LENGTH, CHANNELS) for name in ("q", "k", "v")]
    keys, values = draw("identity k", 1, 3, CHANNELS), draw("identity v", 1, 3, CHANNELS)
    repeated = gated_self_attention(*y, keys[:, [0, 0, 1, 2, 2, 2]], values[:, [0, 0, 1, 2, 2, 2]], HEADS)
    weighted = gated_self_attention(*y, keys, values, HEADS, bias=torch.tensor([2.0, 1.0, 3.0]).log())
    torch.testing.assert_close(weighted, repeated, atol=1e-5, rtol=0)
    left_out = gated_self_attention(*y, keys, values, HEADS, bias=torch.zeros(3).log())
    torch.testing.assert_close(left_out.double(), textbook(*y), atol=1e-5, rtol=0)


def test_identity_tokens_come_in_the_dtype_of_the_stream() -> None:
    y = [draw(name, 1, LENGTH, CHANNELS).bfloat16() for name in ("q", "k", "v")]
    keys, values = draw("identity k", 1, TOKENS, CHANNELS), draw("identity v", 1, TOKENS, CHANNELS)
    out = gated_self_attention(*y, keys, values, HEADS, bias=draw("bias", TOKENS))
    expected = gated_self_attention(
        *y, keys.bfloat16(), values.bfloat16(), HEADS, bias=draw("bias", TOKENS).bfloat16()
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("device", "biased", "asked"), [("meta", False, 1), ("meta", True, 0), ("cpu", False, 0)]
)
def test_the_hosts_attention_is_used_on_accelerators_where_there_is_no_bias(
    device: str, biased: bool, asked: int
) -> None:
    """A host's attention takes no bias of single tokens, and on a CPU PyTorch's own is at least as fast."""
    y = [draw(name, 2, LENGTH, CHANNELS).to(device) for name in ("q", "k", "v")]
    identity = [draw(f"identity {name}", 1, TOKENS, CHANNELS).to(device) for name in ("k", "v")]
    bias = torch.ones(TOKENS, device=device) if biased else None
    calls: list[tuple[object, ...]] = []

    def host(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
        calls.append((*(tuple(x.shape) for x in (query, keys, values)), heads))
        return query

    out = gated_self_attention(*y, *identity, HEADS, bias=bias, attention=host)
    assert out.shape == (2, LENGTH, CHANNELS)
    both = (2, LENGTH + TOKENS, CHANNELS)
    assert calls == [((2, LENGTH, CHANNELS), both, both, HEADS)] * asked


# --- Eq. 7 -----------------------------------------------------------------------------------------------------------


def fresh() -> GatedAdapter:
    """Random weights, both gates closed, in float64."""
    gate = GatedAdapter(TOKEN_WIDTH, CHANNELS, HEADS)
    recipe.fill(nn.ModuleList(list(gate.children())), 5)
    return gate.double()


def opened(attention: float = ATTENTION, feed_forward: float = FEED_FORWARD) -> GatedAdapter:
    gate = fresh()
    with torch.no_grad():
        gate.gate_attention.fill_(attention)
        gate.gate_feed_forward.fill_(feed_forward)
    return gate.requires_grad_(False)


def stream(rows: int = 2) -> Tensor:
    return draw("y", rows, LENGTH, CHANNELS).double()


def e_r(name: str = "e_r", rows: int = 1) -> Tensor:
    return draw(name, rows, TOKENS, TOKEN_WIDTH).double()


def identity(
    gate: GatedAdapter, tokens: Tensor, strength: float | Tensor = 1.0, bias: Tensor | None = None
) -> GateIdentity:
    return GateIdentity(*gate.project(tokens), bias, strength)


def equation_7(
    gate: GatedAdapter,
    y: Tensor,
    people: Sequence[tuple[Tensor, float | Tensor]],
    bias: Tensor | None = None,
) -> Tensor:
    """y + beta tanh(gamma) S([y, E_r]) of all (E_r, beta), each seeing the same y; then the gated feed-forward."""
    weights = gate.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    total: float | Tensor = 0.0
    out = y
    for tokens, beta in people:
        both = torch.cat([y, linear(tokens, "linear").expand(y.shape[0], -1, -1)], dim=1)
        projected = linear(norm(both, "norm1"), "to_qkv")
        query, keys, values = (projected[..., i * CHANNELS : (i + 1) * CHANNELS] for i in range(3))
        logits = None if bias is None else torch.cat([torch.zeros(LENGTH), bias])
        attended = linear(textbook(query, keys, values, logits), "to_out")[:, :LENGTH]
        out = out + beta * math.tanh(float(weights["gate_attention"])) * attended
        total = total + beta
    hidden = linear(norm(out, "norm2"), "ff_in")
    hidden = hidden[..., : 4 * CHANNELS] * F.gelu(hidden[..., 4 * CHANNELS :])
    return out + total * math.tanh(float(weights["gate_feed_forward"])) * linear(hidden, "ff_out")


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # tanh of the gates is fp32


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
    assert list(that_change(deltas)) == [Place(3, "attn2.to_v")]
    to_v = deltas[Place(3, "attn2.to_v")].weight
    assert to_v.shape == (config.site_widths[1], config.context_width)
    assert to_v.sum() == 0.25


# --- the start of a training -----------------------------------------------------------------------------------------


def initialised(config: IDAdapterConfig, seed: int = 0) -> dict[str, Tensor]:
    return dict(initial_adapter(config, "start", seed).state_dict())


def test_a_start_has_closed_gates_and_no_deltas() -> None:
    adapter = initial_adapter(CONFIGS["sd15"], "start")
    for name, tensor in adapter.state_dict().items():
        if "gate_" in name or ".deltas." in name:
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            assert (tensor == (1 if name.endswith("weight") else 0)).all(), name
        else:
            torch.testing.assert_close(tensor.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
            assert len(tensor.unique()) > 0.9 * tensor.numel(), name
    assert set(adapter.mechanisms.openings) == {1, 3, 5, 7, 9, 11, 13}
    assert set(adapter.mechanisms.openings.values()) == {(0.0, 0.0)}
    assert adapter.mechanisms.deltas == {}


def test_a_start_leaves_the_stream_as_it_is_and_still_makes_identities() -> None:
    adapter = initial_adapter(replace(CONFIGS["sd15"], tokens=5), "start")
    made = adapter.encode(vision_features(1, 2))
    assert made.adapter_tokens is not None
    assert 0.5 < made.adapter_tokens.square().mean().sqrt() < 2
    for number, gate in adapter.layers.gates.items():
        keys, values = gate.project(made.adapter_tokens)
        y = draw(number, 1, LENGTH, keys.shape[-1])
        assert torch.equal(gate(y, [GateIdentity(keys, values)]), y)


def test_a_start_follows_its_seed() -> None:
    config = CONFIGS["sd15"]
    one, again, other = initialised(config, 3), initialised(config, 3), initialised(config, 4)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_initialising_replaces_all_values() -> None:
    config = replace(CONFIGS["sd15"], tokens=5)
    encoder, layers = IDAdapterEncoder(config), IDAdapterLayers(config)
    for module in (encoder, layers):
        for parameter in module.parameters():
            nn.init.constant_(parameter, 7.0)
    initialise(encoder, layers, config, 3)
    expected = initialised(config, 3)
    found = {**encoder.state_dict(), **{f"layers.{key}": t for key, t in layers.state_dict().items()}}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_start_of_half_precision_is_the_rounded_one(dtype: torch.dtype) -> None:
    exact = initialised(CONFIGS["sd15"])
    half = initial_adapter(CONFIGS["sd15"], "start", dtype=dtype)
    assert {p.dtype for p in half.layers.parameters()} == {dtype}
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    for key, tensor in half.state_dict().items():
        torch.testing.assert_close(tensor.to(dtype), exact[key].to(dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("text_tokens", [1, 2])
def test_the_identity_word_starts_at_the_length_of_a_usual_word(text_tokens: int) -> None:
    config = replace(
        CONFIGS["sdxl"], text_hidden=512, text_widths=(768, 1280), text_tokens=text_tokens, vision_width=256
    )
    encoder = initial_adapter(config, "start").encoder
    for scale in (0.1, 1.0, 30.0):
        words = encoder.word(scale * draw("class", 4, 256))
        for word in words.values():
            size = word.square().mean(dim=-1).sqrt()
            assert ((size > 0.007) & (size < 0.028)).all()


def test_untrained_adapters_say_so() -> None:
    (note,) = initial_adapter(CONFIGS["sd15"], "start").notes
    assert note.startswith("it is untrained: all gates are closed")
    config = CONFIGS["sd15"]
    for strengths in ({}, {"gate": 0.0}, {"delta": 0.0}):
        assert tiny_idadapter(config, **strengths).notes == ()
    assert tiny_idadapter(config, gate=0.0, delta=0.0).notes == (note,)


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


def test_keys_and_values_do_not_keep_the_queries_alive() -> None:
    keys, values = opened().float().project(draw("e_r", 1, TOKENS, TOKEN_WIDTH))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (keys, values)}
    assert sum(held.values()) == 4 * (keys.numel() + values.numel())


def test_whole_copies_are_repeated_instead_of_a_bias() -> None:
    y = [draw(name, 2, LENGTH, CHANNELS) for name in ("q", "k", "v")]
    keys, values = (draw(f"identity {name}", 1, TOKENS, CHANNELS) for name in ("k", "v"))
    copies = torch.tensor([4.0] * (TOKENS - 1) + [1.0])
    more_keys, more_values, bias = repeat_copies(keys, values, copies.log())
    assert bias is None
    assert more_keys.shape[1] == more_values.shape[1] == 4 * (TOKENS - 1) + 1
    torch.testing.assert_close(
        gated_self_attention(*y, more_keys, more_values, HEADS),
        gated_self_attention(*y, keys, values, HEADS, bias=copies.log()),
    )


@pytest.mark.parametrize("copies", [4 / 3, 0.5, 0.2])
def test_parts_of_copies_stay_a_bias(copies: float) -> None:
    keys, values = (draw(name, 1, TOKENS, CHANNELS) for name in ("k", "v"))
    logs = torch.full((TOKENS,), copies).log()
    assert repeat_copies(keys, values, logs) == (keys, values, logs)
