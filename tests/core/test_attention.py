"""The attention kernels against plain float64 references, in all shapes and dtypes they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.attention import (
    add_residual,
    decoupled_attention,
    identity_attention,
    normalized_rescale,
    prepare_identity,
    prepare_keys_values,
    sample_norm,
    split_heads,
)
from idadapter_core.attention_cpu import prepare_blocks, prepare_heads
from tests.golden import recipe

HEADS, CHANNELS, LENGTH = 4, 32, 10
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}

Prepare = Callable[[Tensor, Tensor, int], Any]


def blocks(keys: Tensor, values: Tensor, heads: int) -> Any:
    return prepare_blocks(split_heads(keys, heads), split_heads(values, heads), heads)


def pairs(keys: Tensor, values: Tensor, heads: int) -> Any:
    return prepare_blocks(split_heads(keys, heads), split_heads(values, heads), 2)


def batched_heads(keys: Tensor, values: Tensor, heads: int) -> Any:
    return prepare_heads(split_heads(keys, heads), split_heads(values, heads))


PREPARATIONS: list[Prepare] = [prepare_keys_values, blocks, pairs, batched_heads, prepare_identity]


def draw(name: str, *shape: int) -> Tensor:
    return recipe.value(3, name, shape)


def reference_attention(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention as in the textbook, head by head, in float64; row i attends to identity i // (B / G)."""
    rows_per_identity = query.shape[0] // keys.shape[0]
    width = query.shape[-1] // heads
    out = torch.empty(query.shape, dtype=torch.float64)
    for row in range(query.shape[0]):
        k, v = (t[row // rows_per_identity].double() for t in (keys, values))
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = query[row, :, part].double() @ k[:, part].T / math.sqrt(width)
            out[row, :, part] = logits.softmax(-1) @ v[:, part]
    return out


@pytest.mark.parametrize("rows_per_identity", [1, 3])
@pytest.mark.parametrize("identities", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 16, 25, 77, 257])
def test_identity_attention_is_plain_attention(tokens: int, identities: int, rows_per_identity: int) -> None:
    query = draw("query", identities * rows_per_identity, LENGTH, CHANNELS)
    keys, values = draw("keys", identities, tokens, CHANNELS), draw("values", identities, tokens, CHANNELS)
    expected = reference_attention(query, keys, values, HEADS)
    for multiple in (None, 1, 16):
        prepared = prepare_keys_values(keys, values, HEADS, multiple)
        if multiple == 16:
            assert prepared.keys.shape[2] % 16 == 0
        out = identity_attention(query, prepared)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [1, 8])
def test_head_counts_and_strided_queries(heads: int) -> None:
    query = draw("strided", LENGTH, 4, 2 * CHANNELS).transpose(0, 1)[..., ::2]
    keys, values = draw("keys", 2, 5, CHANNELS), draw("values", 2, 5, CHANNELS)
    out = identity_attention(query, prepare_keys_values(keys, values, heads))
    torch.testing.assert_close(
        out.double(), reference_attention(query, keys, values, heads), atol=1e-5, rtol=0
    )


def test_keys_and_values_have_different_roles() -> None:
    query, keys, values = (
        draw("query", 1, LENGTH, CHANNELS),
        draw("k", 1, 8, CHANNELS),
        draw("v", 1, 8, CHANNELS),
    )
    out = identity_attention(query, prepare_keys_values(keys, values, HEADS))
    doubled = identity_attention(query, prepare_keys_values(keys, 2 * values, HEADS))
    torch.testing.assert_close(doubled, 2 * out)
    assert not torch.allclose(
        identity_attention(query, prepare_keys_values(2 * keys, values, HEADS)), 2 * out
    )


def test_padding_is_invisible_even_to_large_keys() -> None:
    query = 50 * draw("query", 1, LENGTH, CHANNELS)
    keys = -50 * draw("keys", 1, 3, CHANNELS).abs()
    values = draw("values", 1, 3, CHANNELS)
    out = identity_attention(query, prepare_keys_values(keys, values, HEADS, 16))
    plain = identity_attention(query, prepare_keys_values(keys, values, HEADS, 1))
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
def test_identity_attention_in_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    query, keys, values = (
        draw("query", 2, LENGTH, CHANNELS),
        draw("k", 1, 25, CHANNELS),
        draw("v", 1, 25, CHANNELS),
    )
    out = identity_attention(query.to(dtype), prepare_keys_values(keys.to(dtype), values.to(dtype), HEADS))
    assert out.dtype == dtype
    expected = reference_attention(query, keys, values, HEADS)
    torch.testing.assert_close(out.double(), expected, atol=2 * tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("scale", [1.0, 0.8, -0.5])
def test_rescaled_norm_is_the_scaled_norm_of_the_base(
    dtype: torch.dtype, tolerance: float, scale: float
) -> None:
    base, residual = draw("base", 3, 64, 48).to(dtype), (7 * draw("residual", 3, 64, 48)).to(dtype)
    out = normalized_rescale(base, residual, scale)
    assert out.dtype == dtype
    norms, expected = (t.double().flatten(1).norm(dim=1) for t in (out, base))
    torch.testing.assert_close(norms, abs(scale) * expected, rtol=max(tolerance, 1e-5), atol=0)
    direction = torch.nn.functional.cosine_similarity(out.double().flatten(1), residual.double().flatten(1))
    torch.testing.assert_close(
        direction, torch.full_like(direction, math.copysign(1, scale)), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("magnitude", [1e-2, 1e3, 1e5])
def test_rescaling_forgets_the_magnitude_of_the_residual(magnitude: float) -> None:
    base, residual = draw("base", 2, 64, 48), draw("residual", 2, 64, 48)
    torch.testing.assert_close(
        normalized_rescale(base, magnitude * residual, 1.2),
        normalized_rescale(base, residual, 1.2),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescaling_does_not_depend_on_neighbours(dtype: torch.dtype) -> None:
    base, residual = draw("base", 2, 64, 48).to(dtype), draw("residual", 2, 64, 48).to(dtype)
    alone = normalized_rescale(base[:1], residual[:1], 1.0)
    zero = torch.zeros_like(residual[1:])
    for neighbour in (residual[1:], zero, 1000 * residual[1:]):
        together = normalized_rescale(base, torch.cat([residual[:1], neighbour]), 1.0)
        assert torch.equal(together[:1], alone)
    beside_zero_base = normalized_rescale(torch.cat([base[:1], zero]), residual, 1.0)
    assert torch.equal(beside_zero_base[:1], alone)
    assert not beside_zero_base[1:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_zero_residual_stays_zero(dtype: torch.dtype, scale: float) -> None:
    base = (100 * draw("base", 2, 64, 48)).to(dtype)
    out = normalized_rescale(base, torch.zeros_like(base), scale)
    assert not out.any()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_residual_stays_finite(dtype: torch.dtype) -> None:
    base, residual = (100 * draw("base", 2, 64, 48)).to(dtype), (1e-6 * draw("residual", 2, 64, 48)).to(dtype)
    residual[:, ::2] = 0
    assert torch.isfinite(normalized_rescale(base, residual, 1.0)).all()


def test_large_float16_values_do_not_overflow() -> None:
    large = (8000 * draw("base", 2, 64, 640)).clamp(-40000, 40000).half()
    assert torch.isfinite(sample_norm(large)).all()
    torch.testing.assert_close(
        sample_norm(large).double(), large.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0
    )
    small = draw("residual", 2, 64, 640).half()
    for base, residual in ((large, small), (small, large), (large, large)):
        out = normalized_rescale(base, residual, 1.0).double()
        torch.testing.assert_close(
            out.flatten(1).norm(dim=1), base.double().flatten(1).norm(dim=1), rtol=2e-3, atol=0
        )


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("tokens", [1, 4, 25])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_decoupled_attention_is_base_plus_scaled_attention(
    prepare: Prepare, tokens: int, masked: bool, normalized: bool
) -> None:
    query, base = draw("query", 4, LENGTH, CHANNELS), draw("base", 4, LENGTH, CHANNELS)
    keys, values = draw("keys", 2, tokens, CHANNELS), draw("values", 2, tokens, CHANNELS)
    scale = torch.tensor([0.5, 0.0, -1.0, 2.0])
    mask = draw("mask", 4, LENGTH, 1).sigmoid() if masked else torch.ones(1, LENGTH, 1)
    before = base.clone()
    out = decoupled_attention(
        query,
        base,
        prepare(keys, values, HEADS),
        scale,
        normalized=normalized,
        mask=mask if masked else None,
    )
    assert torch.equal(base, before)
    residual = reference_attention(query, keys, values, HEADS)
    if normalized:
        ratio = base.double().flatten(1).norm(dim=1) / residual.flatten(1).norm(dim=1)
        residual = residual * ratio[:, None, None]
    expected = base.double() + scale[:, None, None].double() * mask.double() * residual
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [True, False])
def test_nothing_to_add_equals_the_base_bit_for_bit(
    prepare: Prepare, dtype: torch.dtype, normalized: bool
) -> None:
    query, base = draw("query", 2, LENGTH, CHANNELS).to(dtype), draw("base", 2, LENGTH, CHANNELS).to(dtype)
    identity = prepare(*(draw(name, 1, 25, CHANNELS).to(dtype) for name in ("k", "v")), HEADS)
    assert torch.equal(decoupled_attention(query, base, identity, 0.0, normalized=normalized), base)
    off = torch.zeros(2)
    assert torch.equal(decoupled_attention(query, base, identity, off, normalized=normalized), base)
    nowhere = torch.zeros(1, LENGTH, 1)
    assert torch.equal(decoupled_attention(query, base, identity, normalized=normalized, mask=nowhere), base)
    half = torch.ones(1, LENGTH, 1)
    half[:, 5:] = 0
    out = decoupled_attention(query, base, identity, normalized=normalized, mask=half)
    assert torch.equal(out[:, 5:], base[:, 5:])
    assert not torch.equal(out[:, :5], base[:, :5])


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 3e3])
def test_extreme_identities_stay_finite(prepare: Prepare, dtype: torch.dtype, magnitude: float) -> None:
    query, base = (
        draw("query", 2, LENGTH, CHANNELS).to(dtype),
        (100 * draw("base", 2, LENGTH, CHANNELS)).to(dtype),
    )
    keys, values = draw("k", 1, 4, CHANNELS).to(dtype), (magnitude * draw("v", 1, 4, CHANNELS)).to(dtype)
    values[..., ::2] = 0
    out = decoupled_attention(query, base, prepare(keys, values, HEADS))
    assert torch.isfinite(out).all()
    if not magnitude:
        assert torch.equal(out, base)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
def test_the_form_of_the_identity_does_not_change_the_result(dtype: torch.dtype, tolerance: float) -> None:
    query, base = draw("query", 2, LENGTH, CHANNELS).to(dtype), draw("base", 2, LENGTH, CHANNELS).to(dtype)
    keys, values = draw("k", 2, 8, CHANNELS).to(dtype), draw("v", 2, 8, CHANNELS).to(dtype)
    first, *others = [
        decoupled_attention(query, base, prepare(keys, values, HEADS)) for prepare in PREPARATIONS
    ]
    for other in others:
        torch.testing.assert_close(other, first, atol=4 * tolerance, rtol=0)


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_strength_inside_a_mask_does_not_depend_on_its_size(prepare: Prepare) -> None:
    query, base = draw("query", 1, LENGTH, CHANNELS), draw("base", 1, LENGTH, CHANNELS)
    identity = prepare(draw("k", 1, 25, CHANNELS), draw("v", 1, 25, CHANNELS), HEADS)
    corner = torch.zeros(1, LENGTH, 1)
    corner[:, :2] = 1
    everywhere = decoupled_attention(query, base, identity)
    inside = decoupled_attention(query, base, identity, mask=corner)
    torch.testing.assert_close(inside[:, :2], everywhere[:, :2])
    assert torch.equal(inside[:, 2:], base[:, 2:])


def test_add_residual_in_place_changes_the_base_only_when_asked() -> None:
    base, residual = draw("base", 1, LENGTH, CHANNELS), draw("residual", 1, LENGTH, CHANNELS)
    before, factor = base.clone(), torch.tensor(0.5)
    fresh = add_residual(base, residual, factor)
    assert torch.equal(base, before)
    assert add_residual(base, residual, factor, inplace=True) is base
    assert torch.equal(base, fresh)
