"""Gated adapters of random weights, and Eq. 7 written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idadapter_core.mechanisms.gated import GatedAdapter, GateIdentity
from tests.golden import recipe

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
