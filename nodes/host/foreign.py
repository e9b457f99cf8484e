"""Attention replacements of other packs, and rescaling of the part that they add to the text's attention.

A replacement can add something (IPAdapter, InstantID, PuLID: attention to tokens of their own) or change the text's attention
itself (PLADIS, NAG, Attention Couple). Only an addition has a length of its own that can be compared with the text's, so only
additions are rescaled. Objects that others can `add` callbacks to are sums by convention. Any other replacement is tried out
once in a run: with halved values the text's attention halves exactly, and an addition stays as it is. The same trial tells whether
a replacement computes the text's attention with or without an override that others have put on all attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules import attention as comfy_attention
from torch import Tensor

from ...idadapter_core.attention import add_residual, norm_factor, token_norms
from ...idadapter_core.errors import InputError
from .owners import owner_of
from .run import Cache, Run

Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
OVERRIDE = "optimized_attention_override"

# Share of a token's text norm below which what another pack adds there counts as rounding.
FLOOR = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}
# How far, as a share of the addition and of the text, a trial may be off before the replacement counts as a change of the text's attention.
TOLERANCE = 0.25


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """The plain attention of a layer, through ComfyUI's own function and whatever overrides it.

    Raises:
        InputError: another node has put texts below those of the picture's rows.
    """
    if len(k) != len(q):
        raise InputError(
            f"another node gives the model's cross-attention {len(k)} texts for {len(q)} rows of the picture, as samplers with negative "
            "guidance inside of the model do (KSamplerWithNAG). No identity can act beside that. Use an ordinary sampler; guidance "
            "nodes that patch the MODEL work."
        )
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
        self.overridden: bool | None = (
            None  # whether its text attention goes through an override of all attention
        )
        self.trial: Tensor | None = None
        """(3,) bool on the device: the outcome of a trial that was not read yet. Whether anything was added, whether it is an
        addition, whether the text's attention is overridden."""

    @property
    def owner(self) -> str:
        return owner_of(self.replacement)

    def settle(self, live: bool, additive: bool, overridden: bool) -> None:
        """Take in the outcome of a trial."""
        self.trial = None
        self.overridden = overridden
        if self.adds is None and live:
            self.adds = additive

    def rescaled(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], scale: Scale) -> Rescaled:
        """The replacement's output with its addition rescaled, or as it is where nothing is known to be added."""
        out = self.replacement(q, k, v, extra)
        if self.adds is False:
            return Rescaled(out, out, False)
        if self.adds and not (OVERRIDE in extra and self.overridden is None):
            text = _text(q, k, v, extra, overridden=self.overridden is not False)
            return self._rescale(out, text, scale)
        return self._tried(out, q, k, v, extra, scale)

    def _tried(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], scale: Scale
    ) -> Rescaled:
        """The output of a replacement about which nothing is settled yet, with the trial that settles it."""
        halved = self.replacement(q, k, v * 0.5, dict(extra))
        estimate = 2 * (out.float() - halved.float())  # of the text's attention
        text = _text(q, k, v, extra, overridden=True)
        overridden = torch.ones((), dtype=torch.bool, device=q.device)
        if OVERRIDE in extra:
            plain = _text(q, k, v, extra, overridden=False)
            overridden = (text.float() - estimate).norm() <= (plain.float() - estimate).norm()
            text = torch.where(overridden, text, plain)
        residual = (out - text).float()
        live = _live(token_norms(text).float(), token_norms(residual), q.dtype)
        off = (text.float() - estimate).norm()
        additive = off <= TOLERANCE * torch.minimum(residual.norm(), text.float().norm())
        if self.adds:
            additive = torch.ones_like(additive)
        self.trial = torch.stack([live.any(), additive, overridden])
        found = self._rescale(out, text, scale)
        # Reading the outcome here would make the host wait in a layer.
        return Rescaled(torch.where(additive, found.out, out), torch.where(additive, text, out), found.fresh)

    def _rescale(self, out: Tensor, text: Tensor, scale: Scale) -> Rescaled:
        residual = out - text
        text_norms, added_norms = token_norms(text).float(), token_norms(residual).float()
        factor = _factor(text_norms, added_norms, _live(text_norms, added_norms, out.dtype), scale)
        result = add_residual(text, residual, factor.to(text.dtype)[..., None])
        return Rescaled(result, text, not result.requires_grad)


class ForeignSlots(Cache):
    """The replacements of other packs that a run has met, by their id; each slot keeps its own alive."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._slots: dict[int, ForeignSlot] = {}

    def slot(self, replacement: Replacement) -> ForeignSlot:
        """The state of another pack's replacement in this run."""
        return self._slots.setdefault(id(replacement), ForeignSlot(replacement))

    def settle_trials(self) -> None:
        """Read what was found out about replacements: one wait for all of them."""
        tried = [(slot, slot.trial) for slot in self._slots.values() if slot.trial is not None]
        if tried:
            outcomes = torch.stack([trial.to(tried[0][1].device) for _, trial in tried]).tolist()
            for (slot, _), (live, additive, overridden) in zip(tried, outcomes, strict=True):
                slot.settle(live, additive, overridden)

    def changing(self) -> tuple[str, ...]:
        """Owners of replacements that change the text's attention itself and are left alone."""
        return tuple(slot.owner for slot in self._slots.values() if slot.adds is False)


def _text(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], overridden: bool) -> Tensor:
    """Plain text attention (B, N, C). A replacement may know nothing of an override that others have put there."""
    if not overridden:
        extra = {name: value for name, value in extra.items() if name != OVERRIDE}
    return text_attention(q, k, v, extra)


def _live(text_norms: Tensor, added_norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Where (B, N) more than rounding was added."""
    return added_norms > FLOOR.get(dtype, 0.0) * text_norms


def _factor(text_norms: Tensor, added_norms: Tensor, live: Tensor, scale: Scale) -> Tensor:
    """Factors (B, N) of an addition: of one length where it lives, 1 where there is nothing but rounding.

    Both norms are taken over the tokens where the addition lives, so that a mask of the other pack does not change the strength
    inside it.
    """
    text, added = (torch.where(live, norms, 0.0).norm(dim=1) for norms in (text_norms, added_norms))
    factor = norm_factor(text, added, scale.scale, added.dtype, at_most=1.0 if scale.limit else None)
    return torch.where(live, factor[:, None], 1.0)
