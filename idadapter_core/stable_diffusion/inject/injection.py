"""An adapter injected into a UNet: each UNet call passes the current setting to hooks on the transformer blocks.

Each mechanism has its own block hooks (`decoupled`, `gated`, `deltas`); this module holds the shared part.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...adapter import Adapter
from ...attention import sample_norm
from ...errors import InputError, MismatchError
from ...mechanisms import Mechanisms
from ...sites import Site
from .blocks import ARGUMENT, argument_position, fitting_blocks

# Key of our entry in ARGUMENT. The setting is passed as an argument because gradient checkpointing reruns a block with its
# original arguments, even if the setting has changed since.
ENTRY = "idadapter"

Observer = Callable[[int, Tensor, Tensor], None]
"""Callback (site_index, added_norm, base_norm); see `Injected.observe`."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a call with the same kind of tokens."""

    tokens: Tensor  # (1 or rows, T, width), on the layers' device
    kept: Tensor | None = None  # indices of the rows; None: all
    bias: Tensor | None = None  # (T,)


@dataclass(frozen=True, eq=False)
class Setting:
    """Identity and strength for calls of the UNet."""

    groups: tuple[Group, ...] = ()
    count: int | None = None  # required number of rows in the call; None: any number
    strength: float | Tensor = 1.0  # a number, or (B,) on the layers' device
    rescale: bool = False

    @property
    def is_off(self) -> bool:
        """Whether no tokens act."""
        return not self.groups or (not isinstance(self.strength, Tensor) and self.strength == 0)


class Call:
    """A call of the UNet with its setting and observer."""

    def __init__(self, setting: Setting, observer: Observer | None):
        self.setting = setting
        self._observer = observer
        self._reported: set[int] = set()

    def is_observed(self, site: int) -> bool:
        """Return whether a site still has to be reported. Checkpointed blocks run twice, but are reported once."""
        return self._observer is not None and site not in self._reported

    @torch.no_grad()
    def report(self, site: int, added: Tensor, base: Tensor) -> None:
        """Call the observer with the norms of `added` (B, N, C) and `base` (B, N, C), at most once per site."""
        if self._observer is not None and self.is_observed(site):
            self._reported.add(site)
            self._observer(site, *(sample_norm(part.detach()).float().norm() for part in (added, base)))


class Part(ABC):
    """The hooks of one mechanism on a transformer block, and their state during a call of the block."""

    hooked: ClassVar[tuple[str, ...]]  # hooked modules of the block, all of which must run

    def __init__(self, block: BlockHooks):
        self.block = block

    @abstractmethod
    def register(self) -> list[Any]:
        """Register the hooks and return handles that remove them."""

    @abstractmethod
    def keep(self, x: Tensor | None) -> None:
        """Store the input x (B, N, C) at the start of a block call; None at its end releases everything stored."""


Parts = Callable[["BlockHooks", Mechanisms], list[Part]]
"""(block, mechanisms) -> the parts of the adapter's mechanisms for that block."""


class Injected:
    """An adapter injected into a UNet, created by `inject`. As a context manager it ejects the adapter at the end.

    Args:
        unet: the UNet, which gets the hooks.
        adapter: the adapter; each call reads the current parameters of its layers.
        mechanisms: the mechanisms of the layers, every delta included.
        parts: creates the parts of a block.
    """

    idle = Setting()

    def __init__(self, unet: Any, adapter: Adapter, mechanisms: Mechanisms, parts: Parts):
        self.unet = unet
        self.layers = adapter.layers
        self.mechanisms = mechanisms
        self.setting = self.idle
        self._observer: Observer | None = None
        self._position = argument_position(unet)
        self._handles: list[Any] = []
        blocks = fitting_blocks(unet, adapter)
        self.sites = tuple(site.index for site in blocks)
        hooks = [BlockHooks(self, site, block, parts) for site, block in blocks.items()]
        # Hooks are registered last, so a failure above leaves the UNet unchanged.
        self._handles = [handle for some in hooks for handle in some.register()]
        self._handles.append(unet.register_forward_pre_hook(self._send, with_kwargs=True))

    @property
    def token_width(self) -> int:
        """Width of the identity tokens. Raises InputError for an adapter that reads none."""
        reader = self.mechanisms.decoupled or self.mechanisms.gated
        if reader is None:
            raise InputError(
                "this adapter reads no identity tokens: it only changes weights. Leave the tokens out."
            )
        return reader.token_width

    def set_identity(
        self,
        tokens: Tensor | None,
        strength: float | Tensor = 1.0,
        *,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        unconditional: Tensor | None = None,
        rescale: bool = False,
    ) -> None:
        """Set the identity for all following calls of the UNet.

        A call keeps the setting from its start, even if gradient checkpointing repeats parts of it in the backward pass.

        `strength` scales all mechanisms, like `weight` of Apply ID Adapter in ComfyUI. Deltas are part of the trained model: they
        act in all rows, with or without an identity.

        Args:
            tokens: (1, T, width) for all rows or (B, T, width), one per row; None: no identity, and no row has tokens. This differs
                from the unconditional case of an adapter with unconditional tokens, whose rows then have the tokens of zeroed
                features (`Identity.adapter_tokens_uncond`).
            strength: a number or, for an adapter without gates and deltas, one per row, shape (B,). 1 is as trained; rows with 0
                are exactly unchanged.
            bias: (T,), added to the attention logits of the tokens (`Identity.adapter_bias[0]`).
            rows: (B,), bool. False drops the identity of a row, which is then exactly unchanged or uses `unconditional`.
            unconditional: (1, T', width), for rows without the identity (`Identity.adapter_tokens_uncond`); they have no bias.
            rescale: normalised rescaling (`attention.normalized_rescale`) of decoupled attention: per site and row, its norm becomes
                `strength` times the norm of the text output. For sampling only, never for training.

        Raises:
            MismatchError: the width of the tokens does not match the adapter.
            InputError: wrong shape or dtype, a strength that is not finite, or the adapter was ejected. Calling the UNet with
                a number of rows other than that of `tokens`, `rows` or `strength` also raises it.
        """
        self._require_injected()
        require_finite(strength)
        if isinstance(strength, Tensor):
            self._require_row_strengths(strength)
        if tokens is None:
            if bias is not None or rows is not None or unconditional is not None:
                raise InputError(
                    "bias and rows belong to tokens, as unconditional does; leave them out, or give the tokens."
                )
            self.setting = Setting(strength=strength)
            return
        self._require_tokens(tokens)
        if unconditional is not None:
            self._require_tokens(unconditional)
        if bias is not None:
            _require_bias(bias, tokens)
        device = next(self.layers.parameters()).device
        count = _row_count(tokens, strength, rows)
        if isinstance(strength, Tensor):
            strength = strength.to(device)
        groups = _groups(tokens.to(device), bias, rows, unconditional)
        self.setting = Setting(groups, count, strength, rescale)

    def _require_row_strengths(self, strength: Tensor) -> None:
        if strength.ndim != 1:
            raise InputError(f"strength must be a number or of shape (batch,), got {tuple(strength.shape)}")
        if self.mechanisms.gated is not None or self.mechanisms.deltas:
            raise InputError(
                "strength must be one number for an adapter with gates or changed weights, which have none for each row"
            )

    def observe(self, observer: Observer | None) -> None:
        """Set a callback for the strength of the adapter in all following calls of the UNet. None, the initial state, removes it.

        It is called as `observer(site, added, base)` where an identity acts, once per site (one of `sites`) and UNet call, even if
        gradient checkpointing repeats the block in the backward pass. `added` is the norm of the adapter's addition, `base` the norm
        of the tensor it is added to, both over all rows with the identity: () fp32, without gradients, on the UNet's device and
        not synchronised until they are read. For gated layers these are the gated residual and the stream y; for decoupled attention
        the attention to the identity, with its strength, and the attention to the text. Deltas are not observed.

        Raises:
            InputError: the adapter was ejected.
        """
        self._require_injected()
        self._observer = observer

    def begin(self) -> Call:
        """Return a call with the current setting."""
        return Call(self.setting, self._observer)

    @contextmanager
    def identity(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Context manager around `set_identity`. Afterwards there is no identity, and the strength is 1."""
        self.set_identity(*args, **kwargs)
        try:
            yield
        finally:
            self.setting = self.idle

    def eject(self) -> None:
        """Remove all hooks from the UNet. Calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.setting = self.idle
        self._observer = None

    def __enter__(self) -> Injected:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.eject()

    def _require_injected(self) -> None:
        if not self._handles:
            raise InputError("this adapter was ejected; inject it again first.")

    def _require_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 3 or not tokens.is_floating_point() or not tokens.numel():
            raise InputError(
                f"tokens must be floating point of shape (1 or batch, tokens, width), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        if tokens.shape[2] != self.token_width:
            raise MismatchError(
                f"the identity tokens are {tokens.shape[2]} wide, the adapter reads tokens of width {self.token_width}. Make them "
                "with the adapter's own encoder."
            )

    def _send(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = _argument(args, kwargs, self._position)
        return _with_argument(args, kwargs, self._position, {**given, ENTRY: self.begin()})


class BlockHooks:
    """The hooks of one transformer block, and the state that its parts share during a call."""

    def __init__(self, injected: Injected, site: Site, block: Any, parts: Parts):
        self.injected = injected
        self.module = block
        self.index = site.index
        self.name = site.diffusers_module.removesuffix(".attn2")
        self.call: Call | None = None
        self.seen: set[str] = set()
        self._position = argument_position(block)
        self.parts = parts(self, injected.mechanisms)

    def register(self) -> list[Any]:
        """Register the hooks and return handles that remove them."""
        return [
            self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
            # Also after an exception, to release the state of a failed call.
            self.module.register_forward_hook(self._leave, always_call=True),
            *(handle for part in self.parts for handle in part.register()),
        ]

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = _argument(args, kwargs, self._position)
        # A block called without its UNet uses the current setting.
        call = given.pop(ENTRY, None) or self.injected.begin()
        x = args[0] if args else kwargs["hidden_states"]
        if call.setting.count not in (None, x.shape[0]):
            raise InputError(
                f"the identity was set for {call.setting.count} rows, but the UNet is called with {x.shape[0]}. Give one entry for each "
                "row of the batch as the UNet sees it (with classifier-free guidance both halves count)."
            )
        self.call = call
        for part in self.parts:
            part.keep(x)
        self.seen.clear()
        return _with_argument(args, kwargs, self._position, given)

    def _leave(self, block: Any, args: tuple[Any, ...], output: Tensor | None) -> None:
        self.call = None
        for part in self.parts:
            part.keep(None)
        missing = [name for part in self.parts for name in part.hooked if name not in self.seen]
        if missing and output is not None:  # output is None after an exception
            raise MismatchError(
                f"{self.name} ran without calling {', '.join(missing)}, so the injected adapter could not act there (attention "
                f"processor: {type(block.attn2.processor).__name__}). Unfuse the projections (unet.unfuse_qkv_projections), or use "
                "the stock processors (unet.set_default_attn_processor)."
            )

    def require_device(self, x: Tensor, weight: Tensor) -> None:
        """Raise MismatchError if the UNet and the adapter's layers are on different devices."""
        if x.device != weight.device:
            raise MismatchError(
                f"{self.name}: the UNet computes on {x.device}, the adapter's layers are on {weight.device}. Move the layers "
                f"(injected.layers.to({str(x.device)!r}))."
            )

    def dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """Return the dtype in which the adapter computes on x.

        Raises:
            MismatchError: the devices differ or, without autocast, the adapter's layers are not in the wider dtype of the two.
        """
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


def _require_bias(bias: Tensor, tokens: Tensor) -> None:
    if bias.shape != tokens.shape[1:2]:
        raise InputError(
            f"bias must have one value for each of the {tokens.shape[1]} tokens, shape ({tokens.shape[1]},), got shape "
            f"{tuple(bias.shape)}"
        )


def _row_count(tokens: Tensor, strength: float | Tensor, rows: Tensor | None) -> int | None:
    """Return the required number of rows of a call, or None if all rows are treated alike.

    Raises:
        InputError: the arguments are for different numbers of rows.
    """
    count = len(tokens)
    if isinstance(strength, Tensor):
        if 1 not in (count, len(strength)) and count != len(strength):
            raise InputError(
                f"tokens has {count} rows, strength {len(strength)}; give one entry for each row, or one for all."
            )
        count = max(count, len(strength))
    if rows is not None:
        if rows.dtype != torch.bool or rows.ndim != 1:
            raise InputError(
                f"rows must be a bool tensor of shape (batch,), got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        if count not in (1, len(rows)):
            raise InputError(
                f"rows has {len(rows)} entries, tokens {count} rows; give one entry for each row."
            )
        return len(rows)
    return None if count == 1 else count


def _groups(
    tokens: Tensor, bias: Tensor | None, rows: Tensor | None, unconditional: Tensor | None
) -> tuple[Group, ...]:
    """Return the rows with the identity, then those without it, as groups on the device of `tokens`."""
    if bias is not None:
        bias = bias.to(tokens.device)
    if rows is None or bool(rows.all()):
        return (Group(tokens, None, bias),)
    # Indexed on the host once, so that no block has to wait for the device.
    keeps = rows.tolist()
    with_identity = torch.tensor([n for n, keep in enumerate(keeps) if keep], dtype=torch.long).to(
        tokens.device
    )
    without = torch.tensor([n for n, keep in enumerate(keeps) if not keep], dtype=torch.long).to(
        tokens.device
    )
    groups: list[Group] = []
    if len(with_identity):
        own = tokens if len(tokens) == 1 else tokens[with_identity]
        groups.append(Group(own, with_identity, bias))
    if unconditional is not None:
        groups.append(Group(unconditional.to(tokens.device), without))
    return tuple(groups)


def injected_into(unet: Any) -> Injected | None:
    """Return the injection of a UNet, or None. It is found through its hook, so a copy of the UNet has its own."""
    owners = [getattr(hook, "__self__", None) for hook in getattr(unet, "_forward_pre_hooks", {}).values()]
    return next((owner for owner in owners if isinstance(owner, Injected)), None)


def require_finite(strength: float | Tensor) -> None:
    """Raise InputError if a strength is not finite."""
    largest = float(strength.abs().max()) if isinstance(strength, Tensor) else abs(strength)
    if not largest <= sys.float_info.max:  # an int can be too large for a float
        raise InputError(f"strength must be a finite number, got {strength}")


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> dict[str, Any]:
    """Return a copy of the value of `ARGUMENT` in a call."""
    return dict((args[position] if len(args) > position else kwargs.get(ARGUMENT)) or {})


def _with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, value: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, ARGUMENT: value}
