"""Perceiver modules shared by the methods (perceiver resampler of arXiv 2204.14198; key names as in the published UniID files)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import merge_heads, split_heads


class PerceiverAttention(nn.Module):
    """Attention of latents over source tokens and the latents themselves, without a residual connection.

    Forward: source (B, S, width), latents (B, T, width), source_bias (S,) or None -> (B, T, width).
    `source_bias` is added to the attention logits of the source tokens: the log of each token's weight.
    """

    def __init__(self, width: int, head_width: int = 64, heads: int | None = None):
        super().__init__()
        self.heads = heads or width // head_width
        inner = self.heads * head_width
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, source: Tensor, latents: Tensor, source_bias: Tensor | None = None) -> Tensor:
        source, latents = self.norm1(source), self.norm2(latents)
        keys, values = self.to_kv(torch.cat([source, latents], dim=1)).chunk(2, dim=-1)
        bias = None if source_bias is None else F.pad(source_bias, (0, latents.shape[1]))[None, None, None]
        query, keys, values = (split_heads(x, self.heads) for x in (self.to_q(latents), keys, values))
        out: Tensor = self.to_out(
            merge_heads(F.scaled_dot_product_attention(query, keys, values, attn_mask=bias))
        )
        return out


def feed_forward(width: int, multiple: int = 4) -> nn.Sequential:
    """Build LayerNorm -> Linear -> GELU -> Linear, without biases in the linear layers."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, multiple * width, bias=False),
        nn.GELU(),
        nn.Linear(multiple * width, width, bias=False),
    )
