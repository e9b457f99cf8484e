"""Gated self-attention over identity tokens between a block's self-attention and cross-attention, with gates that start at 0.

The layers have the shapes of GLIGEN's gated self-attention (arXiv 2301.07093).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import add_residual, gated_self_attention

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class GateIdentity:
    """Keys and values of one identity at one gated adapter."""

    keys: Tensor  # (1 or B, T, C), from `GatedAdapter.project`
    values: Tensor  # (1 or B, T, C)
    bias: Tensor | None = None  # (T,)
    strength: float | Tensor = 1.0  # beta, times a mask: broadcasts against (B, N, 1)


class GatedAdapter(nn.Module):
    """One adapter between self-attention and cross-attention: Eq. 7, then a gated feed-forward.

    Both gates are tanh of a scalar that starts at 0, so a new adapter is exactly the identity function. `operations` provides the
    layers: `torch.nn`, or a host's version of it that manages memory and precision.
    """

    def __init__(self, token_width: int, width: int, heads: int, operations: Any = nn):
        super().__init__()
        self.heads = heads
        self.linear = operations.Linear(token_width, width)
        self.norm1 = operations.LayerNorm(width)
        self.to_qkv = operations.Linear(width, 3 * width, bias=False)
        self.to_out = operations.Linear(width, width)
        self.norm2 = operations.LayerNorm(width)
        self.ff_in = operations.Linear(width, 8 * width)
        self.ff_out = operations.Linear(4 * width, width)
        self.gate_attention = nn.Parameter(torch.zeros(()))
        self.gate_feed_forward = nn.Parameter(torch.zeros(()))

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project E_r (B, T, token width) to keys and values (B, T, width). Once per run is enough: the image plays no part."""
        projected = self.to_qkv(self.norm1(self.linear(tokens)))
        width = projected.shape[-1] // 3
        keys, values = (
            projected[..., width:].clone().chunk(2, dim=-1)
        )  # the clone lets the memory of the queries be freed
        return keys, values

    def forward(
        self,
        x: Tensor,
        identities: Sequence[GateIdentity],
        *,
        gates: tuple[float, float] | None = None,
        attention: Attention | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """y + beta * tanh(gamma) * S([y, E_r]), then a feed-forward gated in the same way: (B, N, C) -> (B, N, C).

        Several identities are summed: the attention of each with its own strength, the feed-forward with the sum of the strengths.
        So one identity given twice at half strength equals giving it once.

        Args:
            x: y, after the block's self-attention; overwritten if `inplace`.
            gates: tanh of the two gates as host-side floats; a part whose gate is 0 is skipped. None reads the parameters.
            attention: see `attention.gated_self_attention`.
        """
        attend, feed = self._gates(gates)
        if _acts(attend):
            for mixed, strength in self._attend(x, identities, attention):
                x = add_residual(x, mixed, _factor(strength, attend, x), inplace)
                inplace = not x.requires_grad  # x is a new tensor now
        if _acts(feed):
            x = add_residual(x, self._feed(x), _factor(_total(identities), feed, x), inplace)
        return x

    def residual(
        self,
        x: Tensor,
        identities: Sequence[GateIdentity],
        *,
        gates: tuple[float, float] | None = None,
        attention: Attention | None = None,
    ) -> Tensor:
        """Return the residual (B, N, C) that `forward` adds to x, without the rounding error of forward(x) - x."""
        attend, feed = self._gates(gates)
        added = torch.zeros_like(x)
        if _acts(attend):
            for mixed, strength in self._attend(x, identities, attention):
                added = add_residual(added, mixed, _factor(strength, attend, x))
        if _acts(feed):
            added = add_residual(added, self._feed(x + added), _factor(_total(identities), feed, x))
        return added

    def _gates(self, known: tuple[float, float] | None) -> tuple[float | Tensor, float | Tensor]:
        if known is not None:
            return known
        return self.gate_attention.float().tanh(), self.gate_feed_forward.float().tanh()

    def _attend(
        self, x: Tensor, identities: Sequence[GateIdentity], attention: Attention | None
    ) -> Iterator[tuple[Tensor, float | Tensor]]:
        """Yield the attention output and the strength of each identity. All of them attend to the same x."""
        query, keys, values = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        for identity in identities:
            mixed = gated_self_attention(
                query,
                keys,
                values,
                identity.keys,
                identity.values,
                self.heads,
                bias=identity.bias,
                attention=attention,
            )
            yield self.to_out(mixed), identity.strength

    def _feed(self, x: Tensor) -> Tensor:
        value, gate = self.ff_in(self.norm2(x)).chunk(2, dim=-1)
        gate = F.gelu(gate)
        fed: Tensor = self.ff_out(gate * value if gate.requires_grad else gate.mul_(value))
        return fed


def _total(identities: Sequence[GateIdentity]) -> float | Tensor:
    return sum((identity.strength for identity in identities), start=0.0)


def _acts(gate: float | Tensor) -> bool:
    return isinstance(gate, Tensor) or gate != 0


def _factor(strength: float | Tensor, gate: float | Tensor, x: Tensor) -> float | Tensor:
    product = strength * gate
    return product.to(x.dtype) if isinstance(product, Tensor) else product


class GatedLayers(nn.ModuleDict):
    """The gated adapters by site number, as a class of its own because hosts show its name.

    Args:
        token_width: width of the identity tokens.
        site_widths: channels of each site, in checkpoint order.
        site_heads: attention heads of each site.
        operations: module that provides the layers: `torch.nn`, or a host's version of it.
    """

    def __init__(
        self, token_width: int, site_widths: Sequence[int], site_heads: Sequence[int], operations: Any = nn
    ):
        super().__init__(
            {
                str(2 * rank + 1): GatedAdapter(token_width, width, heads, operations)
                for rank, (width, heads) in enumerate(zip(site_widths, site_heads, strict=True))
            }
        )
        self.token_width = token_width

    def at(self, index: int) -> GatedAdapter:
        """Return the adapter of the site with checkpoint number `index`."""
        found = self[str(index)]
        assert isinstance(found, GatedAdapter)
        return found

    def openings(self) -> dict[int, tuple[float, float]]:
        """Return tanh of both gates of each site as floats, so that closed parts can be skipped."""
        values: dict[int, tuple[float, float]] = {}
        for number in self:
            gate = self.at(int(number))
            attend, feed = (
                float(g.detach().float().tanh()) for g in (gate.gate_attention, gate.gate_feed_forward)
            )
            values[int(number)] = (attend, feed)
        return values
