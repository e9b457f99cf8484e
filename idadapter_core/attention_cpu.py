"""Attention kernels for CPUs, and the choice between them.

PyTorch's own attention is optimised for hundreds of keys; with a few keys most of its time is overhead around the products. Which
kernel is fastest depends on the processor. The choice depends on its instruction sets and on the shape, never on measured
time, so a machine always produces the same image. `benchmarks/attention_overhead.py` measures the result;
docs/decisions/0011-attention-on-cpus.md has the figures behind the choice.

Shapes: as in `attention`. Keys and values are split by heads, (G, heads, T, head width), with rows of one identity adjacent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# With AMX, for bf16, block-diagonal products of all heads at once are fastest up to this many heads * tokens: zeros cost little.
AMX_COLUMNS = 200

# Otherwise products of one head each are fastest up to BLOCK_TOKENS, and of two heads up to PAIR_TOKENS: in bf16 if the processor
# has instructions for it, and in fp32.
BLOCK_TOKENS = {torch.bfloat16: 64, torch.float32: 8}
PAIR_TOKENS = {torch.bfloat16: 25, torch.float32: 8}

# Without bf16 instructions, fp32 products with the heads as a batch are fastest for bf16 inputs up to this many tokens.
HEAD_TOKENS = 48

# fp32 queries and scores per thread in one block: 4 MB.
HEAD_NUMBERS = 2**20

# Scores of a gated layer computed in one block: 2 MB of bf16.
GATED_SCORES = 2**20


@dataclass(frozen=True)
class Processor:
    """Instruction sets that determine the fastest kernel."""

    vectors: bool  # fp32 vectors of at least 256 bits (AVX2, AVX-512)
    bfloat16: bool  # bf16 dot products (AVX-512 BF16)
    tiles: bool  # bf16 matrix products (AMX)


@cache
def processor() -> Processor:
    """Return the instruction sets of this machine that PyTorch uses. One that an older PyTorch cannot report counts as missing."""
    # Only oneDNN uses the bf16 instructions.
    mkldnn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return Processor(
        vectors=torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
        bfloat16=mkldnn and _has("avx512_bf16", "_is_avx512_bf16_supported"),
        tiles=mkldnn and _has("amx_tile", "_is_amx_tile_supported"),
    )


def _has(capability: str, older: str) -> bool:
    """Return whether the processor has a capability, from PyTorch's public function or, in older releases, the private one."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(capability, False))
    return bool(getattr(torch.cpu, older, lambda: False)())


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# --- training ---------------------------------------------------------------------------------------------------------


class AttentionInFloat32(TorchFunctionMode):
    """Context in which PyTorch's attention leaves autocast. Backwards, it takes two to seven times as long in bf16 without AMX."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = {name: _widened(value) for name, value in (kwargs or {}).items()}
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **given).to(args[0].dtype)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- few tokens, block-diagonal --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockKeysValues:
    """Projected tokens of G identities as block-diagonal matrices of h heads each, for few tokens."""

    keys: Tensor  # (G, heads / h, h * T, h * head width), divided by the square root of the head width
    values: Tensor  # (G, heads / h, h * T, h * head width)
    gram: Tensor  # (G, heads, T, T) fp32: inner products of the values, for the norm of the attention output


def block_heads(dtype: torch.dtype, heads: int, tokens: int) -> int:
    """Return the number of heads per block-diagonal product, or 0 if such products are not the fastest attention."""
    if dtype == torch.bfloat16 and processor().tiles:
        return heads if heads * tokens <= AMX_COLUMNS else 0
    products = {torch.bfloat16: processor().bfloat16, torch.float32: processor().vectors}
    if not products.get(dtype, False) or tokens > BLOCK_TOKENS[dtype]:
        return 0
    return 2 if tokens <= PAIR_TOKENS[dtype] and heads % 2 == 0 else 1


def prepare_blocks(keys: Tensor, values: Tensor, together: int) -> BlockKeysValues:
    """Arrange projected tokens (G, heads, T, head width) as block-diagonal matrices of `together` heads, a divisor of heads."""
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
    """Attention probabilities of queries (B, N, C) over identity tokens: (G, heads, T, B / G, N)."""
    rows, length, channels = query.shape
    groups, heads, count = identity.gram.shape[:3]
    folded = query.reshape(groups, -1, channels)
    differentiable = _needs_gradient(query, identity.keys)
    if identity.keys.shape[1] == 1 or differentiable:
        parts = folded.view(groups, -1, *identity.keys.shape[1::2]).permute(0, 2, 3, 1)
        scores = identity.keys @ parts
    else:
        # Not one batched product, which would copy the transposed queries.
        scores = query.new_empty(*identity.keys.shape[:3], folded.shape[1])
        width = identity.keys.shape[3]
        for keys, queries, outs in zip(identity.keys, folded, scores, strict=True):
            for part, key, out in zip(queries.split(width, dim=1), keys, outs, strict=True):
                torch.mm(part, key.t(), out=out.t())
    # Tokens before pixels, because a softmax over few tokens is fast if the pixels are contiguous.
    scores = scores.view(groups, heads, count, rows // groups, length)
    return scores.softmax(dim=2) if differentiable else torch.softmax(scores, dim=2, out=scores)


def block_norms(probabilities: Tensor, identity: BlockKeysValues) -> Tensor:
    """Norms (B,) fp32 of the attention output of each row, computed without the output itself."""
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
    """base (B, N, C) + factor (B,) * mask (1 or B, N, 1) * attention, with products that accumulate directly into the result."""
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
    """Projected tokens of G identities for attention by fp32 products with the heads as a batch."""

    keys: Tensor  # (G, heads, T, head width) fp32, divided by the square root of the head width
    values: Tensor  # (G, heads, T, head width) fp32


def prefers_heads(dtype: torch.dtype, tokens: int) -> bool:
    """Return whether fp32 products with the heads as a batch are the fastest attention over this many tokens."""
    there = processor()
    slow = dtype == torch.bfloat16 and not (there.tiles or there.bfloat16)
    return slow and there.vectors and tokens <= HEAD_TOKENS


def prepare_heads(keys: Tensor, values: Tensor) -> HeadKeysValues:
    """Prepare projected tokens (G, heads, T, head width) for `head_attention`."""
    scaled = keys.float() * keys.shape[-1] ** -0.5
    return HeadKeysValues(scaled.contiguous(), values.float().contiguous())


def head_attention(query: Tensor, identity: HeadKeysValues) -> Tensor:
    """Attention of image queries (B, N, C) over identity tokens -> (B, N, C). See `attention.identity_attention`.

    Queries are processed in blocks whose working set fits in the CPU cache.
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
    """Write the attention of a block of queries (N, C) over one identity to `out` (N, C). Keys and values: see `HeadKeysValues`.

    Args:
        scratch: working memory of at least (C + heads * T) * N fp32 numbers.
    """
    heads, count, _ = keys.shape
    wide = query
    if query.dtype != torch.float32:
        wide = scratch[: query.numel()].view(query.shape).copy_(query)
    scores = scratch[query.numel() :][: heads * count * len(query)].view(heads, count, -1)
    torch.bmm(keys, _by_head(wide, heads).transpose(1, 2), out=scores)
    # Tokens before pixels, because a softmax over few tokens is fast if the pixels are contiguous.
    torch.softmax(scores, dim=1, out=scores)
    into = out if out.dtype == torch.float32 else wide
    torch.bmm(scores.transpose(1, 2), values, out=_by_head(into, heads))
    if into is not out:
        out.copy_(into)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """View (N, C) as (heads, N, head width)."""
    return x.view(len(x), heads, -1).transpose(0, 1)


# --- many tokens -----------------------------------------------------------------------------------------------------


def prefers_products(dtype: torch.dtype) -> bool:
    """Return whether plain matrix products are faster than PyTorch's attention over hundreds of keys.

    They are with AVX-512 BF16, which PyTorch's attention does not use, so it takes 1.5 times as long. With AMX, PyTorch's
    attention is faster; with neither, bf16 products take 2.4 times as long as PyTorch's attention.
    """
    return dtype == torch.bfloat16 and processor().bfloat16 and not processor().tiles


def attention_in_products(
    query: Tensor, keys: Tensor, values: Tensor, heads: int, logits: Tensor | None
) -> Tensor:
    """Attention (B, N, C), computed head by head with one score buffer that stays in the CPU cache.

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
