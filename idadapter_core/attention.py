"""Attention kernels: pure functions on tensors, no module, no host state.

Shapes: B rows (latents times conditionings), N image tokens, C channels (C = heads * head width), T identity tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch's CPU attention runs up to twice as fast when the number of keys is a multiple of this.
CPU_KEY_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class KeysValues:
    """Projected identity tokens of G identities, split by heads, ready for attention."""

    keys: Tensor  # (G, heads, T, head width)
    values: Tensor  # (G, heads, T, head width)
    bias: Tensor | None = None  # (1, 1, 1, T): 0 for a token, -inf for padding


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, head width) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def prepare_keys_values(keys: Tensor, values: Tensor, heads: int, multiple: int | None = None) -> KeysValues:
    """Split projected tokens (G, T, C) by heads and bring T to a multiple that the device's attention likes.

    The result of attention does not change: where T divides the multiple, all tokens are repeated equally often
    (softmax shares their weight out evenly); otherwise zero tokens are appended and masked by the bias.
    `multiple` defaults to `CPU_KEY_MULTIPLE` on the CPU and 1 elsewhere, where a bias would exclude the fastest kernel.
    """
    if multiple is None:
        multiple = CPU_KEY_MULTIPLE if keys.device.type == "cpu" else 1
    count = keys.shape[1]
    bias = None
    if count < multiple and multiple % count == 0:
        keys, values = (t.repeat(1, multiple // count, 1) for t in (keys, values))
    elif count % multiple:
        padding = multiple - count % multiple
        bias = keys.new_zeros(1, 1, 1, count + padding)
        bias[..., count:] = float("-inf")
        keys, values = (F.pad(t, (0, 0, 0, padding)) for t in (keys, values))
    return KeysValues(split_heads(keys, heads).contiguous(), split_heads(values, heads).contiguous(), bias)


def identity_attention(query: Tensor, identity: KeysValues) -> Tensor:
    """Attention of image queries (B, N, C) over identity tokens -> (B, N, C), before the output projection.

    B must be a multiple of the G identities, with the rows of one identity side by side: row i attends to identity
    i // (B / G). Rows of one identity are folded into the query length, so that K and V are never repeated.
    """
    rows, length, channels = query.shape
    groups, heads = identity.keys.shape[:2]
    folded = query.reshape(groups, rows // groups * length, channels)
    out = F.scaled_dot_product_attention(
        split_heads(folded, heads), identity.keys, identity.values, attn_mask=identity.bias
    )
    return merge_heads(out).view(rows, length, channels)


def sample_norm(x: Tensor) -> Tensor:
    """Frobenius norm over tokens and channels of each sample: (B, N, C) -> (B,), fp32.

    In two stages, each token's in the dtype of `x` and then fp32 over tokens: one pass over the large tensor, and for
    half precision three times faster than a single fp32 reduction.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1), dim=-1, dtype=torch.float32)
    return norm


def rescale_factor(base_norm: Tensor, residual: Tensor, scale: Tensor | float, eps: float = 1e-6) -> Tensor:
    """Factor (B, 1, 1), in the dtype of `residual`, that gives `residual` the norm scale * base_norm (B,) per sample."""
    factor = scale * base_norm / sample_norm(residual).clamp_min(eps)
    return factor.to(residual.dtype)[:, None, None]


def normalized_rescale(base: Tensor, residual: Tensor, scale: Tensor | float, eps: float = 1e-6) -> Tensor:
    """`residual` (B, N, C) rescaled so that ||result|| = scale * ||base|| for each sample.

    UniID's normalized rescaling (arXiv 2512.03964; lyuPang/UniID@41cd236, modules/attention_processor.py). It differs in
    one point: there the whole batch gets an epsilon as soon as one sample's norm is below it, here the epsilon is a floor
    for each sample alone, so no result depends on its neighbours. A zero residual stays zero.
    """
    return residual * rescale_factor(sample_norm(base), residual, scale, eps)


def add_residual(base: Tensor, residual: Tensor, factor: Tensor, inplace: bool = False) -> Tensor:
    """base + factor * residual in one pass. `factor` broadcasts against (B, N, C); `inplace` overwrites `base`."""
    return base.addcmul_(residual, factor) if inplace else torch.addcmul(base, residual, factor)


def decoupled_attention(
    query: Tensor,
    base: Tensor,
    identity: KeysValues,
    scale: Tensor | float = 1.0,
    *,
    normalized: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """base + scale * Attn(query, K_id, V_id), all head-merged and before the output projection.

    Args:
        query: (B, N, C) image queries, the same that gave `base`.
        base: (B, N, C) output of the text cross-attention.
        identity: K_id and V_id of G identities, see `identity_attention`.
        scale: s_a, a number or a tensor broadcasting against (B,).
        normalized: rescale the residual to the norm of `base` first (see `normalized_rescale`).
        mask: (1 or B, N, 1) in 0..1, how much of the residual each image token gets. The norms ignore it, so the
            strength inside a mask does not depend on the size of the mask.
    """
    residual = identity_attention(query, identity)
    if normalized:
        factor = rescale_factor(sample_norm(base), residual, scale, eps)
    else:
        factor = torch.as_tensor(scale, dtype=residual.dtype, device=residual.device).reshape(-1, 1, 1)
    return add_residual(base, residual, factor if mask is None else factor * mask.to(factor.dtype))
