"""Attention kernels: pure functions on tensors, without modules or host state. Kernels for CPUs are in `attention_cpu`.

Shapes: B rows (latents times conditionings), N image tokens, C channels (C = heads * head width), T identity tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_cpu as cpu

# PyTorch's CPU attention runs up to twice as fast when the number of keys is a multiple of this.
CPU_KEY_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class KeysValues:
    """Projected identity tokens of G identities, split by heads, ready for attention."""

    keys: Tensor  # (G, heads, T, head width)
    values: Tensor  # (G, heads, T, head width)
    bias: Tensor | None = None  # (1, 1, 1, T): 0 for a token, -inf for padding


PreparedIdentity = KeysValues | cpu.BlockKeysValues | cpu.HeadKeysValues


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, head width) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def prepare_identity(keys: Tensor, values: Tensor, heads: int) -> PreparedIdentity:
    """Convert projected tokens (G, T, C) to the form with the fastest attention on their device. Results are the same."""
    tokens = keys.shape[1]
    if keys.device.type == "cpu":
        if together := cpu.block_heads(keys.dtype, heads, tokens):
            return cpu.prepare_blocks(split_heads(keys, heads), split_heads(values, heads), together)
        if cpu.prefers_heads(keys.dtype, tokens):
            return cpu.prepare_heads(split_heads(keys, heads), split_heads(values, heads))
    return prepare_keys_values(keys, values, heads)


def prepare_keys_values(keys: Tensor, values: Tensor, heads: int, multiple: int | None = None) -> KeysValues:
    """Split projected tokens (G, T, C) by heads and pad T to a multiple that is fast on the device.

    The result of attention does not change: if T divides the multiple, all tokens are repeated equally often
    (softmax splits their weight evenly); otherwise zero tokens are appended and masked by the bias.
    `multiple` defaults to `CPU_KEY_MULTIPLE` on the CPU and 1 elsewhere, where a bias would rule out the fastest kernel.
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


def identity_attention(query: Tensor, identity: KeysValues | cpu.HeadKeysValues) -> Tensor:
    """Attention of image queries (B, N, C) over identity tokens -> (B, N, C), before the output projection.

    B must be a multiple of the number G of identities, with the rows of one identity adjacent: row i attends to identity
    i // (B / G). Rows of one identity are folded into the query length, so K and V are never repeated.
    """
    if isinstance(identity, cpu.HeadKeysValues):
        return cpu.head_attention(query, identity)
    rows, length, channels = query.shape
    groups, heads = identity.keys.shape[:2]
    folded = query.reshape(groups, rows // groups * length, channels)
    out = F.scaled_dot_product_attention(
        split_heads(folded, heads), identity.keys, identity.values, attn_mask=identity.bias
    )
    return merge_heads(out).view(rows, length, channels)


def sample_norm(x: Tensor) -> Tensor:
    """Frobenius norm over tokens and channels of each sample: (B, N, C) -> (B,), in fp32, or double if `x` is.

    Computed in two stages, per token in the dtype of `x`, then over tokens in fp32. That takes one pass over the large tensor
    and for bf16 is three times faster than a single fp32 reduction. The norm of a token can exceed the range of fp16, so for
    fp16 the first stage is in fp32 too.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(token_norms(x), dim=-1, dtype=dtype)
    return norm


def token_norms(x: Tensor) -> Tensor:
    """Norm over channels of each token: (B, N, C) -> (B, N), in the dtype of `x`, or fp32 if that is fp16."""
    norms: Tensor = torch.linalg.vector_norm(
        x, dim=-1, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype
    )
    return norms


def rescale_factor(
    base_norm: Tensor,
    residual: Tensor,
    scale: Tensor | float,
    eps: float = 1e-6,
    *,
    at_most: float | None = None,
) -> Tensor:
    """Factor (B, 1, 1), in the dtype of `residual`, that scales `residual` to the norm scale * base_norm (B,) per sample.

    It is clamped to the range of that dtype, because an infinite factor would turn zeros of the residual into NaN.

    Args:
        at_most: the factor of `residual` without rescaling. If given, rescaling can only weaken: the factor gets the sign of
            `at_most`, and at most its magnitude.
    """
    norm = sample_norm(residual)
    return norm_factor(base_norm, norm, scale, residual.dtype, eps, at_most=at_most)[:, None, None]


def norm_factor(
    base_norm: Tensor,
    residual_norm: Tensor,
    scale: Tensor | float,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    at_most: float | None = None,
) -> Tensor:
    """`rescale_factor` (B,) from norms (B,)."""
    largest = torch.finfo(dtype).max
    factor = scale * base_norm / residual_norm.clamp_min(eps)
    if at_most is not None:
        factor = factor.clamp(max=abs(at_most)) * (1.0 if at_most >= 0 else -1.0)
    return factor.clamp(-largest, largest).to(dtype)


def normalized_rescale(base: Tensor, residual: Tensor, scale: Tensor | float, eps: float = 1e-6) -> Tensor:
    """Rescale `residual` (B, N, C) so that ||result|| = scale * ||base|| for each sample.

    UniID's normalized rescaling (arXiv 2512.03964; lyuPang/UniID@41cd236, modules/attention_processor.py), with one
    difference: there the whole batch gets an epsilon as soon as one sample's norm is below it; here the epsilon is a floor
    per sample, so samples are independent. A zero residual stays zero.
    """
    return residual * rescale_factor(sample_norm(base), residual, scale, eps)


def add_residual(base: Tensor, residual: Tensor, factor: Tensor | float, inplace: bool = False) -> Tensor:
    """Compute base + factor * residual in one pass. `factor` broadcasts against (B, N, C); `inplace` overwrites `base`."""
    if isinstance(factor, Tensor):
        return base.addcmul_(residual, factor) if inplace else torch.addcmul(base, residual, factor)
    return base.add_(residual, alpha=factor) if inplace else torch.add(base, residual, alpha=factor)


def gated_self_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    identity_keys: Tensor,
    identity_values: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Self-attention over [y, E_r] for the rows of y alone: S of IDAdapter's Eq. 7 (arXiv 2403.13535), before the output projection.

    Eq. 7 discards the outputs at E_r, so no queries are computed for E_r.

    Args:
        query, keys, values: (B, N, C) projections of the image tokens y.
        identity_keys, identity_values: (1 or B, T, C) projections of the identity tokens E_r.
        heads: number of heads; C is heads times the width of a head.
        bias: (T,) added to the logits of the identity tokens: the log of how often each token counts.
        attention: function that computes attention over (B, tokens, C) tensors, used on an accelerator without a bias. Default:
            PyTorch's own, which is always used on a CPU.

    Returns:
        (B, N, C).
    """
    rows, length, _ = query.shape
    keys = torch.cat([keys, identity_keys.to(keys).expand(rows, -1, -1)], dim=1)
    values = torch.cat([values, identity_values.to(values).expand(rows, -1, -1)], dim=1)
    logits = None if bias is None else F.pad(bias.to(query), (length, 0))
    if query.device.type == "cpu" and not torch.is_grad_enabled() and cpu.prefers_products(query.dtype):
        return cpu.attention_in_products(query, keys, values, heads, logits)
    if logits is None and attention is not None and query.device.type != "cpu":
        return attention(query, keys, values, heads)
    out = F.scaled_dot_product_attention(
        split_heads(query, heads),
        split_heads(keys, heads),
        split_heads(values, heads),
        attn_mask=None if logits is None else logits[None, None, None],
    )
    return merge_heads(out)


def repeat_copies(keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Replace a bias (T,) by repeating the keys and values (B, T, C) exp(bias) times, if all repeats are whole numbers.

    Otherwise the arguments are returned unchanged. The result of attention is the same. An accelerator's fastest attention kernel
    takes no bias, and a few more keys cost less than a slower kernel.
    """
    copies = bias.float().cpu().exp()
    whole = copies.round()
    if not torch.allclose(copies, whole, rtol=1e-4) or bool((whole < 1).any()):
        return keys, values, bias
    tokens = torch.arange(len(whole)).repeat_interleave(whole.long()).to(keys.device)
    return keys[:, tokens], values[:, tokens], None


def add_identity(
    base: Tensor,
    query: Tensor,
    identity: PreparedIdentity,
    scale: Tensor | float,
    *,
    base_norm: Tensor | None = None,
    at_most: float | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    inplace: bool = False,
) -> Tensor:
    """Compute base + scale * Attn(query, K_id, V_id), all head-merged and before the output projection.

    Args:
        base: (B, N, C), the tensor to add to; overwritten if `inplace`.
        query: (B, N, C) image queries.
        identity: K_id and V_id of G identities, rows of one identity adjacent (see `identity_attention`).
        scale: s_a, a number or a tensor broadcasting against (B,).
        base_norm: (B,) norms that the residual is rescaled to (see `normalized_rescale`); None: no rescaling, as in training.
        at_most: with `base_norm`, the factor without rescaling, which rescaling then only weakens (see `rescale_factor`).
        mask: (1 or B, N, 1) in 0..1, weight of the residual at each image token. The norms ignore it, so the strength
            inside a mask does not depend on the size of the mask.
    """
    if isinstance(identity, cpu.BlockKeysValues):
        return _add_blocks(base, query, identity, scale, base_norm, at_most, mask, eps, inplace)
    residual = identity_attention(query, identity)
    if base_norm is None:
        factor = torch.as_tensor(scale, dtype=residual.dtype, device=residual.device).reshape(-1, 1, 1)
    else:
        factor = rescale_factor(base_norm, residual, scale, eps, at_most=at_most)
    return add_residual(base, residual, factor if mask is None else factor * mask.to(factor.dtype), inplace)


def _add_blocks(
    base: Tensor,
    query: Tensor,
    identity: cpu.BlockKeysValues,
    scale: Tensor | float,
    base_norm: Tensor | None,
    at_most: float | None,
    mask: Tensor | None,
    eps: float,
    inplace: bool,
) -> Tensor:
    """`add_identity` without materialising the residual: its norm is computed from the attention probabilities."""
    probabilities = cpu.block_probabilities(query, identity)
    if base_norm is None:
        factor = torch.as_tensor(scale, dtype=base.dtype, device=base.device).expand(len(base))
    else:
        norms = cpu.block_norms(probabilities, identity)
        factor = norm_factor(base_norm, norms, scale, base.dtype, eps, at_most=at_most)
    return cpu.add_blocks(base, probabilities, identity, factor, mask, inplace)


def decoupled_attention(
    query: Tensor,
    base: Tensor,
    identity: PreparedIdentity,
    scale: Tensor | float = 1.0,
    *,
    normalized: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`add_identity` to `base`, the output of the text cross-attention; if `normalized`, rescaled relative to its norm."""
    norm = sample_norm(base) if normalized else None
    return add_identity(base, query, identity, scale, base_norm=norm, mask=mask, eps=eps)
