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

# Up to this many heads * tokens, block-diagonal products of all heads at once are the fastest on a processor with AMX: the zeros in
# them cost it little.
AMX_COLUMNS = 200

# Otherwise products of one head each are the fastest up to this many tokens, and of two with fewer: in bf16 where the processor has
# instructions for it, and in fp32.
BLOCK_TOKENS = {torch.bfloat16: 64, torch.float32: 8}
PAIR_TOKENS = {torch.bfloat16: 25, torch.float32: 8}

# Up to this many tokens, fp32 products with the heads as a batch are the fastest for bf16 on a processor without instructions for it.
HEAD_TOKENS = 48

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


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# --- few tokens, block-diagonal --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockKeysValues:
    """Projected identity tokens of G identities as block-diagonal matrices of h heads each, few tokens only."""

    keys: Tensor  # (G, heads / h, h * T, h * head width), divided by the root of the head width
    values: Tensor  # (G, heads / h, h * T, h * head width)
    gram: Tensor  # (G, heads, T, T) fp32: inner products of the values, from which the norm of the attention's output follows


def block_heads(dtype: torch.dtype, heads: int, tokens: int) -> int:
    """How many heads to put into one block-diagonal product, where such products are the fastest attention; otherwise 0."""
    if dtype == torch.bfloat16 and processor().tiles:
        return heads if heads * tokens <= AMX_COLUMNS else 0
    products = {torch.bfloat16: processor().bfloat16, torch.float32: processor().vectors}
    if not products.get(dtype, False) or tokens > BLOCK_TOKENS[dtype]:
        return 0
    return 2 if tokens <= PAIR_TOKENS[dtype] and heads % 2 == 0 else 1


def prepare_blocks(keys: Tensor, values: Tensor, together: int) -> BlockKeysValues:
    """Projected tokens (G, heads, T, head width) as block-diagonal matrices of `together` heads, which divides the heads."""
    wide = values.float()
    return BlockKeysValues(
        _block_diagonal(keys * keys.shape[-1] ** -0.5, together),
        _block_diagonal(values, together),
        wide @ wide.transpose(-1, -2),
    )


def _block_diagonal(x: Tensor, together: int) -> Tensor:
    """(G, heads, T, head width) -> (G, heads / together, together * T, together * head width)."""
    groups, heads, count, width = x.shape
    parts = x.reshape(groups, -1, together, count, width)
    blocks = x.new_zeros(groups, heads // together, together, count, together, width)
    for head in range(together):
        blocks[:, :, head, :, head] = parts[:, :, head]
    return blocks.view(groups, heads // together, together * count, together * width)


def block_probabilities(query: Tensor, identity: BlockKeysValues) -> Tensor:
    """How much each image token of a query (B, N, C) attends to each identity token: (G, heads, T, B / G, N)."""
    rows, length, channels = query.shape
    groups, heads, count = identity.gram.shape[:3]
    folded = query.reshape(groups, -1, channels)
    differentiable = _needs_gradient(query, identity.keys)
    if identity.keys.shape[1] == 1 or differentiable:
        parts = folded.view(groups, -1, *identity.keys.shape[1::2]).permute(0, 2, 3, 1)
        scores = identity.keys @ parts
    else:
        # A batched product would copy the transposed queries.
        scores = query.new_empty(*identity.keys.shape[:3], folded.shape[1])
        width = identity.keys.shape[3]
        for keys, queries, outs in zip(identity.keys, folded, scores, strict=True):
            for part, key, out in zip(queries.split(width, dim=1), keys, outs, strict=True):
                torch.mm(part, key.t(), out=out.t())
    # Tokens before pixels: a softmax over few tokens is fast where the pixels lie side by side.
    scores = scores.view(groups, heads, count, rows // groups, length)
    return scores.softmax(dim=2) if differentiable else torch.softmax(scores, dim=2, out=scores)


def block_norms(probabilities: Tensor, identity: BlockKeysValues) -> Tensor:
    """Norms (B,) of what attention gives each row, without computing it: fp32."""
    in_group = probabilities.shape[3]
    by_row = probabilities.movedim(3, 1).flatten(0, 1)
    moments = (by_row @ by_row.transpose(-1, -2)).float()
    gram = identity.gram[:, None].expand(-1, in_group, -1, -1, -1).flatten(0, 1)
    return (moments * gram).sum(dim=(1, 2, 3)).clamp_min(0).sqrt()


def add_blocks(
    base: Tensor,
    probabilities: Tensor,
    identity: BlockKeysValues,
    factor: Tensor,
    mask: Tensor | None,
    inplace: bool,
) -> Tensor:
    """base (B, N, C) + factor (B,) * mask (1 or B, N, 1) * attention, by products that add to it: the attention is never written."""
    rows, length, _ = base.shape
    groups, _, _, in_group, _ = probabilities.shape
    values = identity.values
    if rows == groups and mask is None:
        values = values * factor[:, None, None, None]
    else:
        per_pixel = factor[:, None] if mask is None else factor[:, None] * mask[..., 0].to(factor.dtype)
        shape = (groups, 1, 1, in_group, length)
        probabilities = probabilities * per_pixel.expand(rows, length).reshape(shape)
    parts, columns, width = values.shape[1:]
    left = probabilities.reshape(groups, parts, columns, -1).transpose(2, 3)
    out = base if inplace else base.clone(memory_format=torch.contiguous_format)
    into = out.view(groups, -1, parts, width).transpose(1, 2)
    if parts == 1:
        into[:, 0].baddbmm_(left[:, 0], values[:, 0])
    else:
        for group in range(groups):
            into[group].baddbmm_(left[group], values[group])
    return out


# --- few tokens, heads as a batch ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadKeysValues:
    """Projected identity tokens of G identities for attention in fp32 products that have the heads as a batch."""

    keys: Tensor  # (G, heads, T, head width) fp32, divided by the root of the head width
    values: Tensor  # (G, heads, T, head width) fp32


def prefers_heads(dtype: torch.dtype, tokens: int) -> bool:
    """Whether fp32 products with the heads as a batch are the fastest attention over this many tokens."""
    there = processor()
    slow = dtype == torch.bfloat16 and not (there.tiles or there.bfloat16)
    return slow and there.vectors and tokens <= HEAD_TOKENS


def prepare_heads(keys: Tensor, values: Tensor) -> HeadKeysValues:
    """Projected tokens (G, heads, T, head width) for `head_attention`."""
    scaled = keys.float() * keys.shape[-1] ** -0.5
    return HeadKeysValues(scaled.contiguous(), values.float().contiguous())


def head_attention(query: Tensor, identity: HeadKeysValues) -> Tensor:
    """Attention of image queries (B, N, C) over identity tokens -> (B, N, C). See `attention.identity_attention`.

    Queries are taken in blocks, so that the numbers of one stay in the cache.
    """
    groups, heads, count, width = identity.keys.shape
    folded = query.reshape(groups, -1, heads * width)
    if _needs_gradient(query, identity.keys, identity.values):
        split = folded.reshape(groups, -1, heads, width).transpose(1, 2)
        keys, values = identity.keys.to(query), identity.values.to(query)
        by_head = F.scaled_dot_product_attention(split, keys, values, scale=1.0)
        return by_head.transpose(1, 2).reshape(query.shape)
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
    # Tokens before pixels: a softmax over few tokens is fast where the pixels lie side by side.
    torch.softmax(scores, dim=1, out=scores)
    into = out if out.dtype == torch.float32 else wide
    torch.bmm(scores.transpose(1, 2), values, out=_by_head(into, heads))
    if into is not out:
        out.copy_(into)


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
