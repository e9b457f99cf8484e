"""IDAdapter in a UNet.

In each transformer block x is the block's input, n the output of its self-attention, and the block goes on with y = x + n. The
output of the self-attention becomes n + r with r the gate's residual at y, so the block goes on with Eq. 7 of arXiv 2403.13535. The
K and V projections of the cross-attention get the product of their input with the trained deltas added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError, MismatchError
from ...methods.idadapter import GatedAdapter, GateIdentity, IDAdapterConfig, IDAdapterLayers
from ...sites import Site
from .injection import Injected, Setting, SiteHooks, require_finite


@dataclass(frozen=True, eq=False)
class GateSetting(Setting):
    """What acts in a call of the UNet."""

    bias: Tensor | None = None  # (T,)
    kept: Tensor | None = None  # numbers of the rows that have the identity; None: all
    strength: float = 1.0


def config_of(layers: IDAdapterLayers) -> IDAdapterConfig:
    """Sizes of layers whose encoder is not there, read from themselves."""
    gates = [gate for gate in layers.gates.values() if isinstance(gate, GatedAdapter)]
    delta: Any = next(iter(layers.deltas.values()))
    return IDAdapterConfig(
        vision_width=gates[0].linear.in_features,
        mixer_heads=1,
        context_width=delta.to_k.in_features,
        site_widths=tuple(gate.linear.out_features for gate in gates),
        site_heads=tuple(gate.heads for gate in gates),
    )


class InjectedIDAdapter(Injected):
    """An IDAdapter at work in a UNet."""

    idle = GateSetting()

    def set_identity(
        self,
        tokens: Tensor | None,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """What acts in the calls of the UNet from now on.

        A call keeps what was set when it began, also where gradient checkpointing repeats parts of it in the backward pass.

        `strength` scales the residual of the gates and the K/V deltas alike, as `weight` of Apply ID Adapter does in ComfyUI.
        The deltas are part of the trained model: they act for all rows, with or without an identity.

        Args:
            tokens: E_r, (1, T, width) for all rows or (B, T, width), one for each; None: no identity, the gates are skipped.
            bias: (T,), added to the attention logits of the tokens (`Identity.adapter_bias[0]`).
            rows: (B,), bool. False: the identity of this row is dropped, and the gates leave the row exactly as it is.
            strength: 1 is as trained; 0 switches off everything, and the UNet gives exactly what it gives alone.

        Raises:
            MismatchError: the tokens are not as wide as those the adapter was made for.
            InputError: another shape or dtype, a strength that is no number, or the adapter was ejected. A call of the UNet with
                another number of rows than `rows` or `tokens` raises it, too.
        """
        self._require_injected()
        require_finite(strength)
        if tokens is None:
            if bias is not None or rows is not None:
                raise InputError("bias and rows belong to tokens; leave them out, or give the tokens.")
            self.setting = GateSetting(strength=strength)
            return
        self._require_tokens(tokens)
        if bias is not None and bias.shape != tokens.shape[1:2]:
            raise InputError(
                f"bias must have one value for each of the {tokens.shape[1]} tokens, shape ({tokens.shape[1]},), got shape "
                f"{tuple(bias.shape)}"
            )
        count = None if tokens.shape[0] == 1 else tokens.shape[0]
        device = self._gate().to_out.weight.device
        kept: Tensor | None = None
        acting: Tensor | None = tokens.to(device)
        if rows is not None:
            if rows.dtype != torch.bool or rows.ndim != 1:
                raise InputError(
                    f"rows must be a bool tensor of shape (batch,), got {rows.dtype} of shape {tuple(rows.shape)}"
                )
            if count not in (None, len(rows)):
                raise InputError(
                    f"rows has {len(rows)} entries, tokens {count} rows; give one entry for each row."
                )
            count = len(rows)
            if not rows.all():
                # Counted on the host here, once, so that no block has to wait for the device.
                kept = torch.tensor([number for number, keep in enumerate(rows.tolist()) if keep]).to(device)
                acting = acting if kept.numel() else None
        self.setting = GateSetting(acting, count, None if bias is None else bias.to(device), kept, strength)

    @property
    def token_width(self) -> int:
        width: int = self._gate().linear.in_features
        return width

    def _gate(self) -> Any:
        return next(iter(self.layers.gates.values()))

    def _hooks(self, site: Site, block: Any) -> _GateHooks:
        return _GateHooks(self, site, block)


class _GateHooks(SiteHooks[GateSetting]):
    hooked = ("attn1", "attn2.to_k", "attn2.to_v")

    def __init__(self, injected: Injected, site: Site, block: Any):
        super().__init__(injected, site, block)
        gate = injected.layers.gates[str(site.index)]
        assert isinstance(gate, GatedAdapter)
        self.gate, self.delta = gate, injected.layers.deltas[str(site.index)]
        self._x: Tensor | None = None

    def register_own(self) -> list[Any]:
        return [
            self.block.attn1.register_forward_hook(self._after_self_attention),
            self.block.attn2.to_k.register_forward_hook(self._after_to_k),
            self.block.attn2.to_v.register_forward_hook(self._after_to_v),
        ]

    def keep(self, x: Tensor | None) -> None:
        self._x = x

    def _after_self_attention(self, attention: Any, args: tuple[Any, ...], n: Tensor) -> Tensor | None:
        call, x = self.call, self._x
        self._x = None
        self.seen.add("attn1")
        if call is None or x is None:
            return None
        setting = call.setting
        if setting.tokens is None or setting.strength == 0:
            return None
        y, tokens = x + n, setting.tokens
        if setting.kept is not None:
            y = y[setting.kept]
            tokens = tokens if tokens.shape[0] == 1 else tokens[setting.kept]
        dtype = self._dtype(y, self.gate.to_out.weight)
        y = y.to(dtype)
        keys, values = self.gate.project(tokens.to(dtype))
        identity = GateIdentity(keys, values, setting.bias, setting.strength)
        residual = self.gate.residual(y, [identity]).to(n.dtype)
        call.tell(self.index, residual, y)
        return n + residual if setting.kept is None else n.index_add(0, setting.kept, residual)

    def _after_to_k(self, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return self._with_delta("to_k", args[0], output)

    def _after_to_v(self, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return self._with_delta("to_v", args[0], output)

    def _with_delta(self, name: str, context: Tensor, output: Tensor) -> Tensor | None:
        self.seen.add(f"attn2.{name}")
        if self.call is None or self.call.setting.strength == 0:
            return None
        weight = getattr(self.delta, name).weight
        added = F.linear(context.to(self._dtype(context, weight)), weight)
        return torch.add(output, added.to(output.dtype), alpha=self.call.setting.strength)

    def _dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """In which dtype x meets the adapter's weights."""
        self.require_device(x, weight)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return x.dtype
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if dtype != weight.dtype:
            raise MismatchError(
                f"{self.name}: the UNet computes in {x.dtype}, the adapter's layers are in {weight.dtype}. Convert the layers "
                f"(injected.layers.to({dtype})), or use autocast."
            )
        return dtype
