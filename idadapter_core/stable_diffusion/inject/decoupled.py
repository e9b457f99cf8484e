"""UniID in a UNet.

At each cross-attention, Attn(q, K_id, V_id) over the projected identity tokens is added to the head-merged output of the text's
attention, before the output projection: q is what `to_q` gives, the sum is what `to_out` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention import add_identity, decoupled_attention, prepare_keys_values, sample_norm
from ...errors import InputError
from ...methods.uniid import SiteProjections, UniIDConfig
from ...sites import Site
from .injection import Injected, Setting, SiteHooks, require_finite


@dataclass(frozen=True, eq=False)
class ProjectedSetting(Setting):
    """What acts in a call of the UNet."""

    strength: Tensor | None = None  # (1 or B,), where the layers are; None where there are no tokens
    rescale: bool = False


def config_of(layers: SiteProjections) -> UniIDConfig:
    """Sizes of layers whose encoder is not there, read from themselves."""
    keys: list[Any] = [projection.to_k_ip for projection in layers.adapter_modules.values()]
    return UniIDConfig(
        text_widths=(),
        context_width=keys[0].in_features,
        site_widths=tuple(key.out_features for key in keys),
    )


class InjectedUniID(Injected):
    """A UniID adapter branch at work in a UNet."""

    idle = ProjectedSetting()

    def set_identity(
        self, tokens: Tensor | None, strength: float | Tensor = 1.0, rescale: bool = False
    ) -> None:
        """What acts in the calls of the UNet from now on.

        A call keeps what was set when it began, also where gradient checkpointing repeats parts of it in the backward pass.

        Args:
            tokens: (1, T, context width) for all rows or (B, T, context width), one for each; None: no identity, and the UNet
                gives exactly what it gives alone. That is not what UniID calls unconditional: there rows have the tokens of
                zeroed face features (`Identity.adapter_tokens_uncond`).
            strength: s_a, a number or one for each row, shape (B,); 1 is as trained, and a row with 0 is exactly as without.
            rescale: normalised rescaling (`attention.normalized_rescale`): per site and row, what is added gets `strength` times
                the norm of the text's output. For sampling; nothing is trained with it.

        Raises:
            MismatchError: the tokens are not as wide as those the adapter was made for.
            InputError: another shape or dtype, a strength that is no number, or the adapter was ejected. A call of the UNet with
                another number of rows than `tokens` or `strength` raises it, too.
        """
        self._require_injected()
        require_finite(strength)
        scales = strength if isinstance(strength, Tensor) else torch.tensor([float(strength)])
        if scales.ndim != 1:
            raise InputError(f"strength must be a number or of shape (batch,), got {tuple(scales.shape)}")
        if tokens is None or (isinstance(strength, float | int) and strength == 0):
            self.setting = self.idle
            return
        self._require_tokens(tokens)
        counts = {len(tokens), len(scales)} - {1}
        if len(counts) > 1:
            raise InputError(
                f"tokens has {len(tokens)} rows, strength {len(scales)}; give one entry for each row, or one for all."
            )
        device = self._weight().device
        # On the device once, so that no layer waits for a number from the host.
        self.setting = ProjectedSetting(
            tokens.to(device), next(iter(counts), None), scales.to(device), rescale
        )

    @property
    def token_width(self) -> int:
        return self._weight().shape[1]

    def _weight(self) -> Tensor:
        weight: Tensor = next(iter(self.layers.parameters()))
        return weight

    def _hooks(self, site: Site, block: Any) -> _ProjectedHooks:
        return _ProjectedHooks(self, site, block)


class _ProjectedHooks(SiteHooks[ProjectedSetting]):
    hooked = ("attn2.to_q", "attn2.to_out.0")

    def __init__(self, injected: Injected, site: Site, block: Any):
        super().__init__(injected, site, block)
        self._query: Tensor | None = None

    def register_own(self) -> list[Any]:
        attention = self.block.attn2
        return [
            attention.to_q.register_forward_hook(self._after_to_q),
            attention.to_out[0].register_forward_pre_hook(self._before_to_out),
        ]

    def keep(self, x: Tensor | None) -> None:
        self._query = None

    def _after_to_q(self, linear: Any, args: tuple[Tensor, ...], query: Tensor) -> None:
        self.seen.add("attn2.to_q")
        self._query = query

    def _before_to_out(self, linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        call, query = self.call, self._query
        self._query = None
        self.seen.add("attn2.to_out.0")
        if call is None or query is None:
            return None
        setting = call.setting
        if setting.tokens is None or setting.strength is None:
            return None
        self.require_device(query, setting.tokens)
        text, *others = args
        keys, values = (
            part.to(query.dtype) for part in self.injected.layers.project(self.index, setting.tokens)
        )
        identity = prepare_keys_values(keys, values, self.block.attn2.heads)
        if call.is_observed(self.index):
            with torch.no_grad():
                # Once more and alone: the difference of the sums would have lost a small one in the rounding of the text's.
                norm = sample_norm(text) if setting.rescale else None
                nothing = torch.zeros_like(text)
                alone = add_identity(nothing, query, identity, setting.strength, base_norm=norm)
                call.tell(self.index, alone, text)
        both = decoupled_attention(query, text, identity, setting.strength, normalized=setting.rescale)
        return (both, *others)
