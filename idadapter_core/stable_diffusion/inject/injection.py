"""What the injections of all methods share: what acts travels with a call of the UNet to hooks at each transformer block."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ...attention import sample_norm
from ...checkpoint import Adapter
from ...errors import InputError, MismatchError
from ...sites import Site
from .blocks import ARGUMENT, argument_position, fitting_blocks

# Our entry in ARGUMENT. What acts travels with the call: gradient checkpointing keeps a block's arguments and runs the block again
# with them, whatever is set by then.
ENTRY = "idadapter"

Observer = Callable[[int, Tensor, Tensor], None]
"""Is told a site's number, the norm of what is added there, and the norm of what it is added to; see `Injected.observe`."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What acts in a call of the UNet."""

    tokens: Tensor | None = None  # (1 or B, T, width)
    rows: int | None = None  # how many rows the call must have; None: any number


S = TypeVar("S", bound=Setting)


class Call(Generic[S]):
    """A call of the UNet: what acts in it, and who is told how strongly."""

    def __init__(self, setting: S, observer: Observer | None):
        self.setting = setting
        self._observer = observer
        self._told: set[int] = set()

    def is_observed(self, site: int) -> bool:
        """Whether somebody wants to know of a site, and has not been told: checkpointed blocks run a second time."""
        return self._observer is not None and site not in self._told

    @torch.no_grad()
    def tell(self, site: int, added: Tensor, base: Tensor) -> None:
        """Report what is added, (B, N, C), and what it is added to, (B, N, C)."""
        if self._observer is not None and self.is_observed(site):
            self._told.add(site)
            self._observer(site, *(sample_norm(part.detach()).float().norm() for part in (added, base)))


class Injected(ABC):
    """An adapter at work in a UNet. Made by `inject`; used in a `with`, it is ejected at the end."""

    idle: ClassVar[Setting]  # what acts while no identity is set

    def __init__(self, unet: Any, adapter: Adapter):
        self.unet = unet
        self.layers: Any = adapter.layers
        self.setting = self.idle
        self._observer: Observer | None = None
        self._position = argument_position(unet)
        self._handles: list[Any] = []
        blocks = fitting_blocks(unet, adapter)
        self.sites = tuple(site.index for site in blocks)
        hooks = [self._hooks(site, block) for site, block in blocks.items()]
        # Only now that nothing can fail any more is the UNet changed.
        self._handles = [handle for some in hooks for handle in some.register()]
        self._handles.append(unet.register_forward_pre_hook(self._send, with_kwargs=True))

    @abstractmethod
    def _hooks(self, site: Site, block: Any) -> SiteHooks[Any]:
        """What hooks into a transformer block."""

    @property
    @abstractmethod
    def token_width(self) -> int:
        """Width of the identity tokens that the layers read."""

    @abstractmethod
    def set_identity(self, *args: Any, **kwargs: Any) -> None:
        """What acts in the calls of the UNet from now on; each method has its own arguments.

        A call keeps what was set when it began, also where gradient checkpointing repeats parts of it in the backward pass.
        """

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` how strongly the adapter acts in the calls of the UNet from now on; None, as at first: tell nobody.

        It is called as `observer(site, added, base)` where an identity acts, once for each site (one of `sites`) and call of the
        UNet, also where gradient checkpointing repeats the block in the backward pass. `added` is the norm of what the adapter
        adds, `base` that of what it is added to, both over all rows with the identity: () fp32, without gradients and on the
        UNet's device, for which nothing waits until they are read. For an IDAdapter that is the residual of the gate against the
        stream y (K/V deltas do not count), for UniID the attention to the identity, with its strength, against that to the text.

        Raises:
            InputError: the adapter was ejected.
        """
        self._require_injected()
        self._observer = observer

    def begin(self) -> Call[Any]:
        """A call of the UNet, with what is set now."""
        return Call(self.setting, self._observer)

    @contextmanager
    def identity(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`set_identity` for the calls inside a `with`. After it there is no identity, and the strength is 1."""
        self.set_identity(*args, **kwargs)
        try:
            yield
        finally:
            self.setting = self.idle

    def eject(self) -> None:
        """Leave the UNet as it was before. Doing it twice is harmless."""
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


class SiteHooks(ABC, Generic[S]):
    """The hooks of one transformer block, and what they know of each other during a call of it."""

    hooked: ClassVar[tuple[str, ...]]  # the modules of a block that must run for the adapter to act

    def __init__(self, injected: Injected, site: Site, block: Any):
        self.injected = injected
        self.block = block
        self.index = site.index
        self.name = site.diffusers_module.removesuffix(".attn2")
        self.call: Call[S] | None = None
        self.seen: set[str] = set()
        self._position = argument_position(block)

    def register(self) -> list[Any]:
        """Put the hooks in place; what removes them."""
        return [
            self.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            # Also after an exception, so that nothing of a failed call is kept.
            self.block.register_forward_hook(self._leave, always_call=True),
            *self.register_own(),
        ]

    @abstractmethod
    def register_own(self) -> list[Any]:
        """Put the method's own hooks in place; what removes them."""

    @abstractmethod
    def keep(self, x: Tensor | None) -> None:
        """A call of the block begins with x (B, N, C), or ends (None): nothing of it may be kept."""

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = _argument(args, kwargs, self._position)
        # A block that is called without its UNet goes by what is set now.
        call = given.pop(ENTRY, None) or self.injected.begin()
        x = args[0] if args else kwargs["hidden_states"]
        if call.setting.rows not in (None, x.shape[0]):
            raise InputError(
                f"the identity was set for {call.setting.rows} rows, but the UNet is called with {x.shape[0]}. Give one entry for each "
                "row of the batch as the UNet sees it (with classifier-free guidance both halves count)."
            )
        self.call = call
        self.keep(x)
        self.seen.clear()
        return _with_argument(args, kwargs, self._position, given)

    def _leave(self, block: Any, args: tuple[Any, ...], output: Tensor | None) -> None:
        self.call = None
        self.keep(None)
        missing = [name for name in self.hooked if name not in self.seen]
        if missing and output is not None:  # there is none after an exception
            raise MismatchError(
                f"{self.name} ran without calling {', '.join(missing)}, so the injected adapter could not act there (attention "
                f"processor: {type(block.attn2.processor).__name__}). Unfuse the projections (unet.unfuse_qkv_projections), or use "
                "the stock processors (unet.set_default_attn_processor)."
            )

    def require_device(self, x: Tensor, weight: Tensor) -> None:
        """Raise MismatchError where the UNet and the adapter's layers are on different devices."""
        if x.device != weight.device:
            raise MismatchError(
                f"{self.name}: the UNet computes on {x.device}, the adapter's layers are on {weight.device}. Move the layers "
                f"(injected.layers.to({str(x.device)!r}))."
            )


def injected_into(unet: Any) -> Injected | None:
    """What is injected into a UNet. Its own hook is the record of it, so a copy of the UNet has one of its own."""
    owners = [getattr(hook, "__self__", None) for hook in getattr(unet, "_forward_pre_hooks", {}).values()]
    return next((owner for owner in owners if isinstance(owner, Injected)), None)


def require_finite(strength: float | Tensor) -> None:
    """Raise InputError where a strength is no number."""
    largest = float(strength.abs().max()) if isinstance(strength, Tensor) else abs(strength)
    if not largest <= sys.float_info.max:  # a whole number may be too large for a float
        raise InputError(f"strength must be a finite number, got {strength}")


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> dict[str, Any]:
    """A copy of the value of `ARGUMENT` in a call."""
    return dict((args[position] if len(args) > position else kwargs.get(ARGUMENT)) or {})


def _with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, value: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, ARGUMENT: value}
