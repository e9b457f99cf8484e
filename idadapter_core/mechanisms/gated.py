"""Self-attention with the identity's tokens between a block's self-attention and its cross-attention, behind gates that start at 0.

The layers have the shape of GLIGEN's gated self-attention (arXiv 2301.07093).
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
    """One identity at one gated adapter."""

    keys: Tensor  # (1 or B, T, C), from `GatedAdapter.project`
    values: Tensor  # (1 or B, T, C)
    bias: Tensor | None = None  # (T,)
    strength: float | Tensor = 1.0  # beta, times a mask: broadcasts against (B, N, 1)


class GatedAdapter(nn.Module):
    """One adapter between self-attention and cross-attention: Eq. 7, then a gated feed-forward.

    Both gates are tanh of a scalar that starts at 0, so a fresh adapter is exactly the identity. `operations` names where the
    layers come from: `torch.nn`, or a host's versions of them that manage memory and precision.
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
        """Keys and values (B, T, width) of E_r (B, T, token width). They do not depend on the image: once per run is enough."""
        projected = self.to_qkv(self.norm1(self.linear(tokens)))
        width = projected.shape[-1] // 3
        keys, values = (
            projected[..., width:].clone().chunk(2, dim=-1)
        )  # does not keep the queries' share alive
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
        """y + beta * tanh(gamma) * S([y, E_r]), and the same with a feed-forward: (B, N, C) -> (B, N, C).

        Several identities add up: the attention of each with its own strength, the feed-forward with the sum of them. So
        one identity twice at half strength equals it once.

        Args:
            x: y, after the block's self-attention; overwritten if `inplace`.
            gates: tanh of the two gates where they are known on the host; a part whose gate is 0 is skipped. None reads the
                parameters.
            attention: see `attention.gated_self_attention`.
        """
        attend, feed = self._gates(gates)
        if _acts(attend):
            for mixed, strength in self._attend(x, identities, attention):
                x = add_residual(x, mixed, _factor(strength, attend, x), inplace)
                inplace = not x.requires_grad  # from here on it is ours
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
        """What `forward` adds to x, (B, N, C). Subtracting x from its result would lose a small residual in the rounding of x."""
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
        """What each identity adds by attention, and its strength. All of them see x as it is now."""
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
    """The gated adapters by site number, with a name that hosts can show.

    Args:
        token_width: of the identity tokens.
        site_widths: channels of each site, in checkpoint order.
        site_heads: attention heads of each site.
        operations: where the layers come from: `torch.nn`, or a host's versions of them.
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
        """The adapter of the site with that checkpoint number."""
        found = self[str(index)]
        assert isinstance(found, GatedAdapter)
        return found

    def openings(self) -> dict[int, tuple[float, float]]:
        """tanh of both gates of each site, on the host: what is 0 costs nothing."""
        values: dict[int, tuple[float, float]] = {}
        for number in self:
            gate = self.at(int(number))
            attend, feed = (
                float(g.detach().float().tanh()) for g in (gate.gate_attention, gate.gate_feed_forward)
            )
            values[int(number)] = (attend, feed)
        return values
