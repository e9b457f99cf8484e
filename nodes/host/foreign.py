"""Attention replacements of other packs, and rescaling of the part they add to the text attention.

A replacement either adds something (IPAdapter, InstantID, PuLID: attention to tokens of their own) or changes the text attention
itself (PLADIS, NAG, Attention Couple). Only an addition has a norm to compare with that of the text, so only additions are
rescaled. Replacement objects with an `add` method for callbacks are sums by convention. Any other replacement gets one trial per
run: with halved values the text attention halves exactly, while an addition stays the same. The same trial detects whether the
replacement computes the text attention with or without a global attention override of another pack.
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

# An addition below this share of a token's text norm counts as rounding.
FLOOR = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}
# Largest error of a trial, relative to the addition and to the text, for a replacement that still counts as an addition.
TOLERANCE = 0.25


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    """Compute the plain attention of a layer with ComfyUI's own function, including any override of it.

    Raises:
        InputError: another node appended texts, so there are more texts than rows of the image.
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
    """Rescaling of additions in one model call."""

    scale: Tensor  # 0-d, on the device
    limit: bool  # only weaken


@dataclass(frozen=True)
class Rescaled:
    """The output of a slot after rescaling."""

    out: Tensor
    text: Tensor  # provides the text norm
    fresh: bool  # no other code references `out`


class ForeignSlot:
    """One replacement of another pack, in one sampling run."""

    def __init__(self, replacement: Replacement):
        self.replacement = replacement
        self.adds: bool | None = True if callable(getattr(replacement, "add", None)) else None
        self.overridden: bool | None = None  # whether its text attention uses a global override of attention
        self.trial: Tensor | None = None
        """(3,) bool on the device, the unread outcome of a trial: whether anything was added, whether it is an addition, and whether
        the text attention is overridden."""

    @property
    def owner(self) -> str:
        return owner_of(self.replacement)

    def store_outcome(self, live: bool, additive: bool, overridden: bool) -> None:
        """Store the outcome of a trial."""
        self.trial = None
        self.overridden = overridden
        if self.adds is None and live:
            self.adds = additive

    def rescaled(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], scale: Scale) -> Rescaled:
        """Return the replacement's output with its addition rescaled, or unchanged if it is not an addition."""
        out = self.replacement(q, k, v, extra)
        if self.adds is False:
            return Rescaled(out, out, False)
        if self.adds and not (OVERRIDE in extra and self.overridden is None):
            text = _text(q, k, v, extra, overridden=self.overridden is not False)
            return self._rescale(out, text, scale)
        return self._with_trial(out, q, k, v, extra, scale)

    def _with_trial(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], scale: Scale
    ) -> Rescaled:
        """Run an unknown replacement together with the trial that classifies it, and return its output."""
        halved = self.replacement(q, k, v * 0.5, dict(extra))
        estimate = 2 * (out.float() - halved.float())  # of the text attention
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
        # Reading the outcome here would make the host wait for the device inside a layer.
        return Rescaled(torch.where(additive, found.out, out), torch.where(additive, text, out), found.fresh)

    def _rescale(self, out: Tensor, text: Tensor, scale: Scale) -> Rescaled:
        residual = out - text
        text_norms, added_norms = token_norms(text).float(), token_norms(residual).float()
        factor = _factor(text_norms, added_norms, _live(text_norms, added_norms, out.dtype), scale)
        result = add_residual(text, residual, factor.to(text.dtype)[..., None])
        return Rescaled(result, text, not result.requires_grad)


class ForeignSlots(Cache):
    """The replacements of other packs seen in a run, by object id. Each slot keeps its replacement alive."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._slots: dict[int, ForeignSlot] = {}

    def slot(self, replacement: Replacement) -> ForeignSlot:
        """Return the slot of another pack's replacement in this run."""
        return self._slots.setdefault(id(replacement), ForeignSlot(replacement))

    def read_trials(self) -> None:
        """Read the outcomes of all trials with a single device synchronisation."""
        tried = [(slot, slot.trial) for slot in self._slots.values() if slot.trial is not None]
        if tried:
            outcomes = torch.stack([trial.to(tried[0][1].device) for _, trial in tried]).tolist()
            for (slot, _), (live, additive, overridden) in zip(tried, outcomes, strict=True):
                slot.store_outcome(live, additive, overridden)

    def owners_not_rescaled(self) -> tuple[str, ...]:
        """Return the owners of replacements that change the text attention itself and are not rescaled."""
        return tuple(slot.owner for slot in self._slots.values() if slot.adds is False)


def _text(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], overridden: bool) -> Tensor:
    """Compute plain text attention (B, N, C). `overridden=False` skips a global override, as some replacements do."""
    if not overridden:
        extra = {name: value for name, value in extra.items() if name != OVERRIDE}
    return text_attention(q, k, v, extra)


def _live(text_norms: Tensor, added_norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask (B, N) of the tokens where more than rounding was added."""
    return added_norms > FLOOR.get(dtype, 0.0) * text_norms


def _factor(text_norms: Tensor, added_norms: Tensor, live: Tensor, scale: Scale) -> Tensor:
    """Factors (B, N) of an addition: one value per row where `live`, 1 elsewhere (only rounding there).

    Both norms cover the live tokens alone, so that a mask of the other pack does not change the strength inside the mask.
    """
    text, added = (torch.where(live, norms, 0.0).norm(dim=1) for norms in (text_norms, added_norms))
    factor = norm_factor(text, added, scale.scale, added.dtype, at_most=1.0 if scale.limit else None)
    return torch.where(live, factor[:, None], 1.0)
