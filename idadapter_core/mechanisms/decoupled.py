"""Tokens with keys and values of their own beside the text's, in each cross-attention of the UNet (IP-Adapter, arXiv 2308.06721)."""

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
        token_width: of the identity tokens, which is the context width of the UNet.
        site_widths: channels of each site, in checkpoint order; empty where nothing acts in cross-attention.
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
        """Projections that another module owns, by the checkpoint number of their site."""
        found = cls(token_width, ())
        found.adapter_modules.update({str(number): pair for number, pair in pairs.items()})
        return found

    def pair(self, index: int) -> KeyValueProjection:
        """The projections of the site with that checkpoint number."""
        found = self.adapter_modules[str(index)]
        assert isinstance(found, KeyValueProjection)
        return found

    def project(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K_id and V_id (G, T, width) of the site with that checkpoint number, for tokens (G, T, token width).

        Runs on the device of the tokens in fp32; the weights stay where they are and are only passed through.
        """
        tokens = tokens.float()
        pair = self.pair(index)
        keys, values = (
            F.linear(tokens, linear.weight.to(tokens.device).float())
            for linear in (pair.to_k_ip, pair.to_v_ip)
        )
        return keys, values
