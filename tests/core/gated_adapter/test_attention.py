"""Attention over [y, E_r] against attention written out head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from idadapter_core.attention import gated_self_attention, repeat_copies
from tests.core.gated_adapter.gates import (
    CHANNELS,
    DTYPES,
    HEADS,
    LENGTH,
    TOKEN_WIDTH,
    TOKENS,
    draw,
    opened,
    textbook,
)

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


# --- residuals and copies --------------------------------------------------------------------------------------------


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
