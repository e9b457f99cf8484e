"""Attention on CPUs: which kernel each kind of processor gets, and that all of them compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core import attention_cpu
from idadapter_core.attention import (
    KeysValues,
    decoupled_attention,
    gated_self_attention,
    prepare_identity,
)
from idadapter_core.attention_cpu import AttentionInFloat32, BlockKeysValues, HeadKeysValues, Processor
from tests.golden import recipe

HEADS, CHANNELS, LENGTH = 4, 32, 50
PROCESSORS = {
    "AMX": Processor(vectors=True, bfloat16=True, tiles=True),
    "AVX-512 BF16": Processor(vectors=True, bfloat16=True, tiles=False),
    "AVX2": Processor(vectors=True, bfloat16=False, tiles=False),
    "unknown": Processor(vectors=False, bfloat16=False, tiles=False),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def draw(name: str, *shape: int) -> Tensor:
    return recipe.value(7, name, shape)


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """In float64, head by head; row i attends to identity i // (B / G)."""
    each, width = len(query) // len(keys), query.shape[-1] // HEADS
    keys, values = (x.repeat_interleave(each, dim=0).double() for x in (keys, values))
    parts = []
    for part in (slice(head * width, (head + 1) * width) for head in range(HEADS)):
        scores = query[..., part].double() @ keys[..., part].transpose(1, 2) / math.sqrt(width)
        parts.append(scores.softmax(-1) @ values[..., part])
    return torch.cat(parts, dim=-1)


def kernel_of(tokens: Tensor, heads: int) -> str:
    prepared = prepare_identity(tokens, tokens, heads)
    if isinstance(prepared, BlockKeysValues):
        return f"{heads // prepared.keys.shape[1]} heads"
    return "batched" if isinstance(prepared, HeadKeysValues) else "PyTorch"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of the processor that the code takes this machine's for."""
    name: str = request.param
    monkeypatch.setattr(attention_cpu, "processor", lambda: PROCESSORS[name])
    return name


every_processor = pytest.mark.parametrize("on", PROCESSORS, indirect=True)


@pytest.mark.parametrize(
    ("on", "dtype", "tokens", "kernel"),
    [
        ("AMX", torch.bfloat16, 4, "8 heads"),
        ("AMX", torch.bfloat16, 25, "8 heads"),
        ("AMX", torch.bfloat16, 26, "PyTorch"),
        ("AMX", torch.float32, 8, "2 heads"),
        ("AMX", torch.float32, 9, "PyTorch"),
        ("AVX-512 BF16", torch.bfloat16, 25, "2 heads"),
        ("AVX-512 BF16", torch.bfloat16, 26, "1 heads"),
        ("AVX-512 BF16", torch.bfloat16, 257, "PyTorch"),
        ("AVX-512 BF16", torch.float32, 25, "PyTorch"),
        ("AVX2", torch.bfloat16, 25, "batched"),
        ("AVX2", torch.bfloat16, 77, "PyTorch"),
        ("AVX2", torch.float32, 4, "2 heads"),
        ("AVX2", torch.float32, 77, "PyTorch"),
        ("AVX2", torch.float16, 4, "PyTorch"),
        ("unknown", torch.float32, 4, "PyTorch"),
        ("unknown", torch.bfloat16, 4, "PyTorch"),
    ],
    indirect=["on"],
)
def test_each_processor_gets_the_kernel_that_was_the_fastest_on_it(
    on: str, dtype: torch.dtype, tokens: int, kernel: str
) -> None:
    assert kernel_of(draw("keys", 1, tokens, 64).to(dtype), 8) == kernel


@pytest.mark.parametrize("on", ["AVX-512 BF16"], indirect=True)
def test_an_odd_head_has_no_other_to_go_with(on: str) -> None:
    assert kernel_of(draw("keys", 1, 4, 60).bfloat16(), 5) == "1 heads"


@pytest.mark.parametrize("on", ["AMX"], indirect=True)
def test_other_devices_have_nothing_to_do_with_it(on: str) -> None:
    keys = torch.empty(1, 4, 64, dtype=torch.bfloat16, device="meta")
    assert type(prepare_identity(keys, keys, 8)) is KeysValues


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ("AVX512", {"avx512_bf16": True, "amx_tile": True}, PROCESSORS["AMX"]),
        ("AVX512", {"avx512_bf16": True, "amx_tile": False}, PROCESSORS["AVX-512 BF16"]),
        ("AVX512", {"avx512_bf16": False}, PROCESSORS["AVX2"]),
        ("AVX2", {}, PROCESSORS["AVX2"]),
        ("DEFAULT", {}, PROCESSORS["unknown"]),
        ("SVE256", {"bf16": True}, PROCESSORS["unknown"]),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_the_processor_is_known_by_its_instructions(
    monkeypatch: pytest.MonkeyPatch, capability: str, flags: dict[str, bool], expected: Processor, older: bool
) -> None:
    """An older PyTorch has private calls, one for each instruction, or none."""
    calls = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_tile": "_is_amx_tile_supported"}
    told = {calls[name]: lambda has=has: has for name, has in flags.items() if name in calls}
    cpu = SimpleNamespace(**told) if older else SimpleNamespace(get_capabilities=lambda: flags)
    monkeypatch.setattr(torch, "cpu", cpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert attention_cpu.processor.__wrapped__() == expected


def test_bf16_instructions_count_only_where_pytorch_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found = attention_cpu.processor.__wrapped__()
    assert (found.bfloat16, found.tiles) == (False, False)


@every_processor
@pytest.mark.parametrize("block", [1, 7, 2**20])
@pytest.mark.parametrize("rows_per_identity", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES.items())
def test_no_processor_computes_anything_else(
    on: str,
    dtype: torch.dtype,
    tolerance: float,
    rows_per_identity: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of one query, of 7 (which leaves a rest), and of all."""
    per_query = CHANNELS + HEADS * 5
    monkeypatch.setattr(attention_cpu, "HEAD_NUMBERS", block * per_query)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    query = draw("query", 2 * rows_per_identity, LENGTH, CHANNELS)
    keys, values = draw("keys", 2, 5, CHANNELS), draw("values", 2, 5, CHANNELS)
    expected = attention(query, keys, values)
    original = query.clone()
    nothing = torch.zeros(query.shape, dtype=dtype)
    identity = prepare_identity(keys.to(dtype), values.to(dtype), HEADS)
    low = query.to(dtype)
    out = decoupled_attention(low, nothing, identity, normalized=False)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=2 * tolerance, rtol=0)
    assert torch.equal(low, original.to(dtype))


@every_processor
def test_a_query_need_not_lie_in_memory_in_one_piece(on: str) -> None:
    query = draw("strided", LENGTH, 4, 2 * CHANNELS).transpose(0, 1)[..., ::2]
    keys, values = draw("keys", 2, 5, CHANNELS), draw("values", 2, 5, CHANNELS)
    nothing = torch.zeros(query.shape)
    out = decoupled_attention(query, nothing, prepare_identity(keys, values, HEADS), normalized=False)
    torch.testing.assert_close(out.double(), attention(query, keys, values), atol=1e-5, rtol=0)


@every_processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_queries_and_tokens(on: str, dtype: torch.dtype) -> None:
    tensors = [draw(n, 2, count, CHANNELS) for n, count in (("q", LENGTH), ("k", 5), ("v", 5), ("b", LENGTH))]

    def gradients(function: Callable[..., Tensor], of: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(of, copy=True).requires_grad_() for x in tensors]
        function(*leaves).double().square().sum().backward()
        return [x.grad.double() for x in leaves if x.grad is not None]

    def ours(query: Tensor, keys: Tensor, values: Tensor, base: Tensor) -> Tensor:
        return decoupled_attention(query, base, prepare_identity(keys, values, HEADS), normalized=False)

    found = gradients(ours, dtype)
    expected = gradients(lambda q, k, v, b: b.double() + attention(q, k, v), torch.float64)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2 * TOLERANCES[dtype] * other.norm()


@every_processor
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_gated_attention_is_the_same_on_all_processors(
    on: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = [draw(name, 2, LENGTH, CHANNELS).bfloat16() for name in ("q", "k", "v")]
    identity = [draw(f"identity {name}", 1, 6, CHANNELS).bfloat16() for name in ("k", "v")]
    bias = torch.zeros(6) if biased else None
    in_products = attention_cpu.attention_in_products
    asked: list[tuple[Any, ...]] = []

    def counted(*arguments: Any) -> Tensor:
        asked.append(arguments)
        return in_products(*arguments)

    monkeypatch.setattr(attention_cpu, "attention_in_products", counted)
    out = gated_self_attention(*y, *identity, HEADS, bias=bias)
    keys, values = (torch.cat([a, b.expand(2, -1, -1)], dim=1) for a, b in zip(y[1:], identity, strict=True))
    torch.testing.assert_close(out.double(), attention(y[0], keys, values), atol=8e-2, rtol=0)
    assert bool(asked) == (on == "AVX-512 BF16")
    gated_self_attention(*(x.float() for x in y), *identity, HEADS, bias=bias)
    assert len(asked) <= 1


def test_attention_in_float32_is_the_same_attention() -> None:
    query, key, value = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    plain = F.scaled_dot_product_attention(query, key, value)
    with AttentionInFloat32(), torch.autocast("cpu", torch.bfloat16):
        found = F.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value=value.bfloat16())
        assert (query @ key.transpose(2, 3)).dtype == torch.bfloat16, "all else stays as it was"
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), plain, atol=0.03, rtol=0.03)
    found.float().sum().backward()
    assert query.grad is not None
