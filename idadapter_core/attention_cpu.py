"""Attention on a CPU: which kernel suits which processor, and the kernels themselves.

PyTorch's own attention is made for hundreds of keys; over a few it spends most of its time around the products. Which kernel is
faster depends on the products that the processor is good at. The choice goes by its instructions and by the shape, never by
a measured time, so that a machine always gives the same picture. `benchmarks/attention_overhead.py` measures the result,
docs/decisions/0011-attention-on-cpus.md has the figures behind the choice.

Shapes: as in `attention`. Keys and values come split by heads, (G, heads, T, head width), with rows of one identity side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many heads * tokens, bf16 products with block-diagonal K and V are the fastest on a processor with AMX: the zeros in
# them cost it little.
AMX_BLOCK_COLUMNS = 200

# Up to this many tokens, batched products of the heads beat PyTorch's attention; in bf16 on a processor without AMX.
HEAD_TOKENS = {torch.bfloat16: 48, torch.float32: 28}

# fp32 numbers of queries and scores that each thread works on at once: 4 MB.
HEAD_NUMBERS = 2**20

# Scores of a gated layer that are computed at once: 2 MB of bf16.
GATED_SCORES = 2**20


@dataclass(frozen=True)
class Processor:
    """The instructions of a processor that decide which kernel is the fastest."""

    vectors: bool  # fp32 in vectors of at least 256 bits (AVX2, AVX-512)
    bfloat16: bool  # products of bf16 numbers, by instructions of its own (AVX-512 BF16)
    tiles: bool  # products of bf16 matrices (AMX)


@cache
def processor() -> Processor:
    """This machine's processor, as far as PyTorch uses it. An instruction that an older PyTorch does not report counts as missing."""
    # oneDNN is what uses the instructions for bf16.
    mkldnn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return Processor(
        vectors=torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
        bfloat16=mkldnn and _has("avx512_bf16", "_is_avx512_bf16_supported"),
        tiles=mkldnn and _has("amx_tile", "_is_amx_tile_supported"),
    )


def _has(capability: str, older: str) -> bool:
    """Whether the processor has a capability, by the public call or, where PyTorch has none yet, by the private one."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(capability, False))
    return bool(getattr(torch.cpu, older, lambda: False)())


# --- few tokens, block-diagonal --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockKeysValues:
    """Projected identity tokens of G identities as block-diagonal matrices: all heads in one product, few tokens only."""

    keys: Tensor  # (G, heads * T, C), divided by the root of the head width
    values: Tensor  # (G, heads * T, C)
    gram: Tensor  # (G, heads, T, T) fp32: inner products of the values, from which the norm of the attention's output follows


def prefers_blocks(dtype: torch.dtype, heads: int, tokens: int) -> bool:
    """Whether block-diagonal products are the fastest attention over this many tokens."""
    return processor().tiles and dtype == torch.bfloat16 and heads * tokens <= AMX_BLOCK_COLUMNS


def prepare_blocks(keys: Tensor, values: Tensor) -> BlockKeysValues:
    """Projected tokens (G, heads, T, head width) as block-diagonal matrices."""
    wide = values.float()
    return BlockKeysValues(
        _block_diagonal(keys * keys.shape[-1] ** -0.5), _block_diagonal(values), wide @ wide.transpose(-1, -2)
    )


def _block_diagonal(x: Tensor) -> Tensor:
    """(G, heads, T, head width) -> (G, heads * T, heads * head width)."""
    groups, heads, count, width = x.shape
    blocks = x.new_zeros(groups, heads, count, heads, width)
    for head in range(heads):
        blocks[:, head, :, head] = x[:, head]
    return blocks.view(groups, heads * count, heads * width)


def block_probabilities(query: Tensor, identity: BlockKeysValues) -> Tensor:
    """How much each image token of a query (B, N, C) attends to each identity token: (G, heads, T, B / G, N)."""
    rows, length, channels = query.shape
    groups, heads, count = identity.gram.shape[:3]
    scores = torch.bmm(identity.keys, query.reshape(groups, -1, channels).transpose(1, 2))
    # Tokens before pixels: a softmax over few tokens is fast where the pixels lie side by side.
    return scores.view(groups, heads, count, rows // groups, length).softmax(dim=2)


def block_norms(probabilities: Tensor, identity: BlockKeysValues) -> Tensor:
    """Norms (B,) of what attention gives each row, without computing it: fp32."""
    in_group = probabilities.shape[3]
    by_row = probabilities.movedim(3, 1).flatten(0, 1)
    moments = (by_row @ by_row.transpose(-1, -2)).float()
    gram = identity.gram.repeat_interleave(in_group, dim=0)
    return (moments * gram).sum(dim=(1, 2, 3)).clamp_min(0).sqrt()


def add_blocks(
    base: Tensor,
    probabilities: Tensor,
    identity: BlockKeysValues,
    factor: Tensor,
    mask: Tensor | None,
    inplace: bool,
) -> Tensor:
    """base (B, N, C) + factor (B,) * mask (1 or B, N, 1) * attention, by one product that never writes the attention itself."""
    rows, length, channels = base.shape
    groups, heads, count, in_group, _ = probabilities.shape
    values = identity.values
    if rows == groups and mask is None:
        values = values * factor[:, None, None]
    else:
        per_pixel = factor[:, None] if mask is None else factor[:, None] * mask[..., 0].to(factor.dtype)
        shape = (groups, 1, 1, in_group, length)
        probabilities = probabilities * per_pixel.expand(rows, length).reshape(shape)
    left = probabilities.reshape(groups, heads * count, -1).transpose(1, 2)
    if inplace:
        base.view(groups, -1, channels).baddbmm_(left, values)
        return base
    return torch.baddbmm(base.reshape(groups, -1, channels), left, values).view(rows, length, channels)


# --- few tokens, heads as a batch ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadKeysValues:
    """Projected identity tokens of G identities for attention in products that have the heads as a batch."""

    keys: Tensor  # (G, heads, T, head width) fp32, divided by the root of the head width
    values: Tensor  # (G, heads, T, head width): bf16 where the processor has products for it, else fp32


def prefers_heads(dtype: torch.dtype, tokens: int) -> bool:
    """Whether products with the heads as a batch are the fastest attention over this many tokens."""
    if dtype == torch.bfloat16 and processor().tiles:
        return False
    return processor().vectors and tokens <= HEAD_TOKENS.get(dtype, 0)


def prepare_heads(keys: Tensor, values: Tensor) -> HeadKeysValues:
    """Projected tokens (G, heads, T, head width) for `head_attention`."""
    keeps = values.dtype == torch.bfloat16 and processor().bfloat16
    scaled = keys.float() * keys.shape[-1] ** -0.5
    return HeadKeysValues(scaled.contiguous(), (values if keeps else values.float()).contiguous())


def head_attention(query: Tensor, identity: HeadKeysValues) -> Tensor:
    """Attention of image queries (B, N, C) over identity tokens -> (B, N, C). See `attention.identity_attention`.

    Scores are computed in fp32 on all processors: a batched product in bf16 would copy the transposed queries, and one product
    for each head costs more in calls than it saves. Queries are taken in blocks whose numbers stay in the cache.
    """
    groups, heads, count, width = identity.keys.shape
    folded = query.reshape(groups, -1, heads * width)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, identity.keys, identity.values)):
        split = folded.reshape(groups, -1, heads, width).transpose(1, 2)
        keys, values = identity.keys.to(query), identity.values.to(query)
        differentiable = F.scaled_dot_product_attention(split, keys, values, scale=1.0)
        return differentiable.transpose(1, 2).reshape(query.shape)
    out = folded.new_empty(folded.shape)
    block = max(1, HEAD_NUMBERS * torch.get_num_threads() // (heads * (width + count)))
    scratch = identity.keys.new_empty(min(block, folded.shape[1]) * heads * (width + count))
    for keys, values, queries, outs in zip(identity.keys, identity.values, folded, out, strict=True):
        for part, into in zip(queries.split(block), outs.split(block), strict=True):
            _attend(part, keys, values, scratch, into)
    return out.view(query.shape)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scratch: Tensor, out: Tensor) -> None:
    """Attention of a block of queries (N, C) over one identity into `out` (N, C). For keys and values see `HeadKeysValues`.

    Args:
        scratch: at least (C + heads * T) * N fp32 numbers to work in.
    """
    heads, count, _ = keys.shape
    wide = query
    if query.dtype != torch.float32:
        wide = scratch[: query.numel()].view(query.shape).copy_(query)
    scores = scratch[query.numel() :][: heads * count * len(query)].view(heads, count, -1)
    torch.bmm(keys, _by_head(wide, heads).transpose(1, 2), out=scores)
    scores = scores.to(values.dtype)
    # Tokens before pixels: a softmax over few tokens is fast where the pixels lie side by side.
    torch.softmax(scores, dim=1, out=scores)
    if values.dtype == out.dtype:
        torch.bmm(scores.transpose(1, 2), values, out=_by_head(out, heads))
    else:
        torch.bmm(scores.transpose(1, 2), values, out=_by_head(wide, heads))
        out.copy_(wide)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """A view (heads, N, head width) of (N, C)."""
    return x.view(len(x), heads, -1).transpose(0, 1)


# --- many tokens -----------------------------------------------------------------------------------------------------


def prefers_products(dtype: torch.dtype) -> bool:
    """Whether plain matrix products beat PyTorch's attention over hundreds of keys.

    With AVX-512 BF16 they do: PyTorch's attention makes no use of it and takes 1.5 times as long. With AMX it is the faster one;
    with neither, products in bf16 take 2.4 times as long as it does.
    """
    return dtype == torch.bfloat16 and processor().bfloat16 and not processor().tiles


def attention_in_products(
    query: Tensor, keys: Tensor, values: Tensor, heads: int, logits: Tensor | None
) -> Tensor:
    """Attention (B, N, C), head by head, through one buffer of scores that stays in the cache.

    Scores are rounded to the dtype before the softmax, as in the host's own attention for CPUs.
    """
    rows, length, channels = query.shape
    count, width = keys.shape[1], channels // heads
    block = max(1, min(length, GATED_SCORES // count))
    query = query * width**-0.5
    out = torch.empty_like(query)
    buffer = query.new_empty(block, count)
    for row in range(rows):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            head_keys, head_values = keys[row, :, part].t(), values[row, :, part]
            for start in range(0, length, block):
                some = query[row, start : start + block, part]
                scores = buffer[: len(some)]
                if logits is None:
                    torch.mm(some, head_keys, out=scores)
                else:
                    torch.addmm(logits[None], some, head_keys, out=scores)
                torch.softmax(scores, dim=-1, out=scores)
                out[row, start : start + block, part] = scores @ head_values
    return out
