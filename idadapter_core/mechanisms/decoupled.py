"""Decoupled cross-attention: identity tokens with K and V projections of their own at each site (IP-Adapter, arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueProjection(nn.Module):
    """K and V projections of one site."""

    def __init__(self, token_width: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(token_width, width, bias=False)
        self.to_v_ip = nn.Linear(token_width, width, bias=False)


class SiteProjections(nn.Module):
    """K and V projections of the identity tokens, one pair per cross-attention site, numbered as in checkpoints.

    Args:
        token_width: width of the identity tokens, equal to the context width of the UNet.
        site_widths: channels of each site, in checkpoint order; empty for an adapter without decoupled attention.
    """

    def __init__(self, token_width: int, site_widths: Sequence[int]):
        super().__init__()
        self.token_width = token_width
        self.adapter_modules = nn.ModuleDict(
            {
                str(2 * rank + 1): KeyValueProjection(token_width, width)
                for rank, width in enumerate(site_widths)
            }
        )

    @classmethod
    def around(cls, token_width: int, pairs: Mapping[int, KeyValueProjection]) -> SiteProjections:
        """Wrap projections owned by another module, given by the checkpoint number of their site."""
        found = cls(token_width, ())
        found.adapter_modules.update({str(number): pair for number, pair in pairs.items()})
        return found

    def pair(self, index: int) -> KeyValueProjection:
        """Return the projections of the site with checkpoint number `index`."""
        found = self.adapter_modules[str(index)]
        assert isinstance(found, KeyValueProjection)
        return found

    def project(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (G, T, token width) to K_id and V_id (G, T, width) of the site with checkpoint number `index`.

        Computed in fp32 on the tokens' device. Weights are copied there for the call; the originals stay on their device.
        """
        tokens = tokens.float()
        pair = self.pair(index)
        keys, values = (
            F.linear(tokens, linear.weight.to(tokens.device).float())
            for linear in (pair.to_k_ip, pair.to_v_ip)
        )
        return keys, values
