"""Attention replacements of other packs, and rescaling of the part that they add to the text's attention.

A replacement can add something (IPAdapter, InstantID, PuLID: attention to tokens of their own) or change the text's attention
itself (PLADIS, NAG, Attention Couple). Only an addition has a length of its own that can be compared with the text's, so only
additions are rescaled. Objects that others can `add` callbacks to are sums by convention. Any other replacement is tried out
once: with halved values the text's attention halves exactly, and an addition stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules import attention as comfy_attention
from torch import Tensor

from ...idadapter_core.attention import add_residual, token_norms
from .owners import owner_of

Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
OVERRIDE = "optimized_attention_override"

# Share of a token's text norm below which what another pack adds there counts as rounding.
FLOOR = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}
# How far, as a share of the addition and of the text, a trial may be off before the replacement counts as a change of the text's attention.
TOLERANCE = 0.25


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """The plain attention of a layer, through ComfyUI's own function and whatever overrides it."""
    out: Tensor = comfy_attention.optimized_attention(
        q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
    )
    return out


@dataclass(frozen=True)
class Scale:
    """How additions are rescaled in one model call."""

    scale: Tensor  # 0-d, on the device
    limit: bool  # only weaken


@dataclass(frozen=True)
class Rescaled:
    """The output of a slot after rescaling."""

    out: Tensor
    text: Tensor  # its norm counts as the text's
    fresh: bool  # nobody else holds `out`


class ForeignSlot:
    """One replacement of another pack, in one sampling run."""

    def __init__(self, replacement: Replacement):
        self.replacement = replacement
        self.adds: bool | None = True if callable(getattr(replacement, "add", None)) else None
        self._trial: Tensor | None = None  # (2,) bool: whether anything was added, whether it is an addition

    @property
    def owner(self) -> str:
        return owner_of(self.replacement)

    @property
    def trial(self) -> Tensor | None:
        """The outcome of the latest trial, still on its device; None where there was none."""
        return self._trial if self.adds is None else None

    def settle(self, live: bool, additive: bool) -> None:
        """Take in what `trial` says, once it was read."""
        if live:
            self.adds = additive

    def rescaled(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], scale: Scale) -> Rescaled:
        """The replacement's output with its addition rescaled, or as it is where nothing is known to be added."""
        out = self.replacement(q, k, v, extra)
        if self.adds is False:
            return Rescaled(out, out, False)
        text = self._nearest_text(q, k, v, extra, out)
        residual = out - text
        text_norms, added_norms = token_norms(text).float(), token_norms(residual).float()
        live = added_norms > FLOOR.get(q.dtype, 0.0) * text_norms
        factor = _factor(text_norms, added_norms, live, scale)
        reference = text
        if self.adds is None:
            additive = self._try_out(q, k, v, extra, text, residual, live)
            factor = torch.where(additive, factor, 1.0)
            reference = torch.where(additive, text, out)
        result = add_residual(text, residual, factor.to(text.dtype)[..., None])
        return Rescaled(result, reference, not result.requires_grad)

    def _nearest_text(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], out: Tensor) -> Tensor:
        """Plain text attention (B, N, C). A replacement may know nothing of an override that others have put there."""
        text = text_attention(q, k, v, extra)
        if OVERRIDE not in extra:
            return text
        plain = text_attention(q, k, v, {name: value for name, value in extra.items() if name != OVERRIDE})
        distances = [(out - reference).float().flatten(1).norm(dim=1) for reference in (text, plain)]
        return torch.where((distances[1] < distances[0])[:, None, None], plain, text)

    def _try_out(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: dict[str, Any],
        text: Tensor,
        residual: Tensor,
        live: Tensor,
    ) -> Tensor:
        """Whether `residual` is an addition, 0-d on the device: reading it here would make the host wait."""
        halved = self.replacement(q, k, v * 0.5, dict(extra))
        addition = 2 * halved.float() - (text + residual).float()
        off = (addition - residual.float()).norm()
        additive = off <= TOLERANCE * torch.minimum(residual.float().norm(), text.float().norm())
        self._trial = torch.stack([live.any(), additive])
        return additive


def _factor(text_norms: Tensor, added_norms: Tensor, live: Tensor, scale: Scale) -> Tensor:
    """Factors (B, N) of an addition: of one length where it lives, 1 where there is nothing but rounding.

    Both norms are taken over the tokens where the addition lives, so that a mask of the other pack does not change the strength
    inside it.
    """
    text, added = (torch.where(live, norms, 0.0).norm(dim=1) for norms in (text_norms, added_norms))
    factor = scale.scale * text / added.clamp_min(torch.finfo(added.dtype).tiny)
    if scale.limit:
        factor = factor.clamp(max=1.0)
    return torch.where(live, factor[:, None], 1.0)
