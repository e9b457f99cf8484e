"""IDAdapter inside a *diffusers* `UNet2DConditionModel`, for training and for comparison with ComfyUI.

    injected = inject(unet, adapter)
    with injected.identity(tokens, bias):
        prediction = unet(latents, timestep, encoder_hidden_states=text).sample
    injected.eject()

Everything is done by hooks: no module is replaced, no forward function copied, no weight of the UNet touched. This module does
not import diffusers; it goes by the names of modules.

In each transformer block x is the block's input, n the output of its self-attention, and the block goes on with y = x + n. The
output of the self-attention becomes n + r with r the gate's residual at y, so the block goes on with Eq. 7 of arXiv 2403.13535. The K and V
projections of the cross-attention get the product of their input with the trained deltas added. Gates and deltas are read from
the parameters of the layers at each call, so an optimiser's steps show at once and gradients reach all of them, and the tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Adapter
from .errors import InputError, MismatchError
from .methods.idadapter import METHOD, GatedAdapter, GateIdentity, IDAdapterConfig, IDAdapterLayers
from .sites import Site, attention_sites

# The argument that diffusers hands from the UNet down to each transformer block, and our entry in it. What acts travels with the
# call: gradient checkpointing keeps a block's arguments and runs the block again with them, whatever is set by then.
ARGUMENT = "cross_attention_kwargs"
ENTRY = "idadapter"
_HOOKED = ("attn1", "attn2.to_k", "attn2.to_v")


def inject(unet: Any, adapter: Adapter | IDAdapterLayers) -> Injected:
    """Let an IDAdapter act in a UNet until it is ejected.

    The layers stay where they are and as they are: move them to the UNet's device, and choose what is trained, on the layers
    themselves. Without autocast they must be in the UNet's dtype or in a wider one, in which they then compute.

    Args:
        unet: a diffusers UNet2DConditionModel (SD1.5, SD2.1, SDXL, or any size of that family); not a wrapper around one.
        adapter: an IDAdapter, or its layers alone.

    Raises:
        MismatchError: the adapter is of another method or for another UNet, the UNet has other transformer blocks or fused
            projections, or an adapter is injected already. The UNet is then as it was.
    """
    if isinstance(adapter, IDAdapterLayers):
        adapter = _bare_adapter(adapter)
    if adapter.method != METHOD:
        raise MismatchError(
            f"{adapter.name} is an adapter of the method {adapter.method!r}; only IDAdapter's layers can be injected into a "
            "diffusers UNet. Choose an IDAdapter."
        )
    if _injected(unet) is not None:
        raise MismatchError(
            f"an ID adapter is injected into this {type(unet).__name__} already, and two would train against each other. Eject it "
            "first (idadapter_core.unet.eject)."
        )
    return Injected(unet, adapter)


def eject(unet: Any) -> None:
    """Remove the adapter that was injected into a UNet. Harmless where there is none."""
    injected = _injected(unet)
    if injected is not None:
        injected.eject()


@dataclass(frozen=True, eq=False)
class _Setting:
    """What acts in a call of the UNet."""

    tokens: Tensor | None = None  # (1 or B, T, width)
    bias: Tensor | None = None  # (T,)
    kept: Tensor | None = None  # numbers of the rows that have the identity; None: all
    rows: int | None = None  # how many rows the call must have; None: any number
    strength: float = 1.0


class Injected:
    """An IDAdapter at work in a UNet. Made by `inject`."""

    def __init__(self, unet: Any, adapter: Adapter):
        self.unet = unet
        self.layers: IDAdapterLayers = adapter.layers
        self._setting = _Setting()
        self._position = _position(unet)
        self._handles: list[Any] = []
        sites = attention_sites(unet.state_dict())
        blocks = {site.index: _block(unet, site.diffusers_module) for site in sites}
        widths = {
            site.comfy_module: (block.attn2.to_k.out_features, block.attn2.to_k.in_features)
            for site, block in zip(sites, blocks.values(), strict=True)
        }
        adapter.require_sites(sites, widths, type(unet).__name__)
        hooks = [_SiteHooks(self, site, blocks[site.index]) for site in sites]
        # Only now that nothing can fail any more is the UNet changed.
        self._handles = [handle for some in hooks for handle in some.register()]
        self._handles.append(unet.register_forward_pre_hook(self._send, with_kwargs=True))

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
        if not self._handles:
            raise InputError("this adapter was ejected; inject it again before an identity is set.")
        if not math.isfinite(strength):
            raise InputError(f"strength must be a finite number, got {strength}")
        if tokens is None:
            if bias is not None or rows is not None:
                raise InputError("bias and rows belong to tokens; leave them out, or give the tokens.")
            self._setting = _Setting(strength=strength)
            return
        self._require_tokens(tokens, bias)
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
        self._setting = _Setting(acting, None if bias is None else bias.to(device), kept, count, strength)

    @contextmanager
    def identity(
        self,
        tokens: Tensor | None,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        strength: float = 1.0,
    ) -> Iterator[None]:
        """`set_identity` for the calls inside a `with`. After it there is no identity, and the strength is 1."""
        self.set_identity(tokens, bias, rows, strength)
        try:
            yield
        finally:
            self._setting = _Setting()

    def eject(self) -> None:
        """Leave the UNet as it was before. Doing it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._setting = _Setting()

    def _gate(self) -> Any:
        return next(iter(self.layers.gates.values()))

    def _require_tokens(self, tokens: Tensor, bias: Tensor | None) -> None:
        if tokens.ndim != 3 or not tokens.is_floating_point() or not tokens.numel():
            raise InputError(
                f"tokens must be floating point of shape (1 or batch, tokens, width), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        width = self._gate().linear.in_features
        if tokens.shape[2] != width:
            raise MismatchError(
                f"the identity tokens are {tokens.shape[2]} wide, the adapter reads tokens of width {width}. Make them with the "
                "adapter's own encoder."
            )
        if bias is not None and bias.shape != tokens.shape[1:2]:
            raise InputError(
                f"bias must have one value for each of the {tokens.shape[1]} tokens, shape ({tokens.shape[1]},), got shape "
                f"{tuple(bias.shape)}"
            )

    def _send(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = _argument(args, kwargs, self._position)
        return _with_argument(args, kwargs, self._position, {**given, ENTRY: self._setting})


class _SiteHooks:
    """The hooks of one transformer block, and what they know of each other during a call of it."""

    def __init__(self, injected: Injected, site: Site, block: Any):
        self.injected = injected
        self.block = block
        self.name = site.diffusers_module.removesuffix(".attn2")
        gate = injected.layers.gates[str(site.index)]
        assert isinstance(gate, GatedAdapter)
        self.gate, self.delta = gate, injected.layers.deltas[str(site.index)]
        self._position = _position(block)
        self._setting: _Setting | None = None
        self._x: Tensor | None = None
        self._seen: set[str] = set()

    def register(self) -> list[Any]:
        """Put the hooks in place; what removes them."""
        block = self.block
        return [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            # Also after an exception, so that nothing of a failed call is kept.
            block.register_forward_hook(self._leave, always_call=True),
            block.attn1.register_forward_hook(self._after_self_attention),
            block.attn2.to_k.register_forward_hook(self._after_to_k),
            block.attn2.to_v.register_forward_hook(self._after_to_v),
        ]

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = _argument(args, kwargs, self._position)
        # A block that is called without its UNet goes by what is set now.
        setting = given.pop(ENTRY, self.injected._setting)
        x = args[0] if args else kwargs["hidden_states"]
        if setting.rows not in (None, x.shape[0]):
            raise InputError(
                f"the identity was set for {setting.rows} rows, but the UNet is called with {x.shape[0]}. Give tokens and rows for "
                "the batch as the UNet sees it (with classifier-free guidance both halves count)."
            )
        self._setting, self._x = setting, x
        self._seen.clear()
        return _with_argument(args, kwargs, self._position, given)

    def _after_self_attention(self, attention: Any, args: tuple[Any, ...], n: Tensor) -> Tensor | None:
        setting, x = self._setting, self._x
        self._x = None
        self._seen.add("attn1")
        if setting is None or x is None or setting.tokens is None or setting.strength == 0:
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
        return n + residual if setting.kept is None else n.index_add(0, setting.kept, residual)

    def _after_to_k(self, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return self._with_delta("to_k", args[0], output)

    def _after_to_v(self, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return self._with_delta("to_v", args[0], output)

    def _with_delta(self, name: str, context: Tensor, output: Tensor) -> Tensor | None:
        self._seen.add(f"attn2.{name}")
        if self._setting is None or self._setting.strength == 0:
            return None
        weight = getattr(self.delta, name).weight
        added = F.linear(context.to(self._dtype(context, weight)), weight)
        return torch.add(output, added.to(output.dtype), alpha=self._setting.strength)

    def _leave(self, block: Any, args: tuple[Any, ...], output: Tensor | None) -> None:
        self._setting = self._x = None
        missing = [name for name in _HOOKED if name not in self._seen]
        if missing and output is not None:  # there is none after an exception
            raise MismatchError(
                f"{self.name} ran without calling {', '.join(missing)}, so the injected adapter could not act there (attention "
                f"processor: {type(block.attn2.processor).__name__}). Unfuse the projections (unet.unfuse_qkv_projections), or use "
                "the stock processors (unet.set_default_attn_processor)."
            )

    def _dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """In which dtype x meets the adapter's weights."""
        if x.device != weight.device:
            raise MismatchError(
                f"{self.name}: the UNet computes on {x.device}, the adapter's layers are on {weight.device}. Move the layers "
                f"(injected.layers.to({str(x.device)!r}))."
            )
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if dtype != weight.dtype:
            raise MismatchError(
                f"{self.name}: the UNet computes in {x.dtype}, the adapter's layers are in {weight.dtype}. Convert the layers "
                f"(injected.layers.to({dtype})), or use autocast."
            )
        return dtype


def _injected(unet: Any) -> Injected | None:
    """What is injected into a UNet. Its own hook is the record of it, so a copy of the UNet has one of its own."""
    owners = [getattr(hook, "__self__", None) for hook in getattr(unet, "_forward_pre_hooks", {}).values()]
    return next((owner for owner in owners if isinstance(owner, Injected)), None)


def _bare_adapter(layers: IDAdapterLayers) -> Adapter:
    """An Adapter around layers whose sizes are read from themselves."""
    gates = [gate for gate in layers.gates.values() if isinstance(gate, GatedAdapter)]
    delta: Any = next(iter(layers.deltas.values()))
    config = IDAdapterConfig(
        vision_width=gates[0].linear.in_features,
        mixer_heads=1,
        context_width=delta.to_k.in_features,
        site_widths=tuple(gate.linear.out_features for gate in gates),
        site_heads=tuple(gate.heads for gate in gates),
    )
    return Adapter(name="the adapter", digest="", method=METHOD, config=config, encoder=None, layers=layers)


def _block(unet: Any, module: str) -> Any:
    """The transformer block of a cross-attention layer."""
    name = module.removesuffix(".attn2")
    block = unet.get_submodule(name)
    if problem := _problem(block):
        raise MismatchError(
            f"{name} of this {type(unet).__name__} {problem}, and the adapter cannot act there as it was made to. Use a UNet of "
            "SD1.5, SD2.1, SDXL or of that family."
        )
    # Not its flag fused_projections: unfusing exchanges the processors and leaves the flag as it is.
    if type(block.attn2.processor).__name__.startswith("Fused"):
        raise MismatchError(
            f"the projections of {module} are fused, so K and V cannot be changed apart. Call unet.unfuse_qkv_projections() before "
            "the adapter is injected."
        )
    return block


def _problem(block: Any) -> str:
    """Why a block does not compute x + attn1(norm(x)) and then cross-attention alone; empty where it does."""
    if all(kind.__name__ != "BasicTransformerBlock" for kind in type(block).__mro__):
        return f"is a {type(block).__name__}, not a BasicTransformerBlock"
    if block.norm_type != "layer_norm":
        return f"has norms of type {block.norm_type!r}, not 'layer_norm'"
    if block.only_cross_attention or block.double_self_attention:
        return "has not self-attention followed by cross-attention"
    if block.pos_embed is not None:
        return "has position embeddings of its own"
    if hasattr(block, "fuser"):
        return "has a GLIGEN fuser, which takes the same place"
    return ""


def _position(module: nn.Module) -> int:
    """Place of `ARGUMENT` among the positional arguments of a module's forward."""
    names = list(inspect.signature(type(module).forward).parameters)
    if ARGUMENT not in names:
        raise MismatchError(
            f"{type(module).__name__} takes no {ARGUMENT}, so it is no UNet2DConditionModel of diffusers. Pass that model itself, "
            "not a pipeline, nor what accelerate, DDP or torch.compile wrap around it. In ComfyUI, use Apply ID Adapter."
        )
    return names.index(ARGUMENT) - 1  # without self


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> dict[str, Any]:
    """A copy of the value of `ARGUMENT` in a call."""
    return dict((args[position] if len(args) > position else kwargs.get(ARGUMENT)) or {})


def _with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, value: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, ARGUMENT: value}
