"""Identities and torch.compile.

ComfyUI compiles a model without guards on `transformer_options`, so a graph compiled for one set of attention patches is
silently used for another: the picture is then wrong, or the identity missing. Model calls in which an identity acts therefore
run uncompiled; all others stay compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...idadapter_core.errors import MismatchError

COMPILE_KEY = "torch.compile"  # under which ComfyUI registers the wrapper that swaps in compiled modules


class _Uncompiled:
    """Counts the calls that need eager execution: the switch is one for the whole process, the calls may be in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._stance: contextlib.AbstractContextManager[Any] | None = None

    def enter(self) -> None:
        with self._lock:
            if self._calls == 0:
                if not hasattr(torch.compiler, "set_stance"):
                    raise MismatchError(
                        f"an ID adapter acts on a compiled model, which torch {torch.__version__} cannot switch off for it "
                        "(torch 2.6 or newer can). Update torch, or remove the node that compiles the model."
                    )
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._calls += 1

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_uncompiled = _Uncompiled()


def has_compile_wrapper(options: dict[str, Any]) -> bool:
    """Whether ComfyUI's compile node acts on a model call."""
    return bool(options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY))


def has_compiled_modules(unet: Any) -> bool:
    """Whether a UNet, or anything in it, is compiled by another way."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in _all_modules(unet))


def _all_modules(module: Any) -> Iterator[Any]:
    """A module and all modules in it. Not `modules()`: a pack patches it to hide the modules that it has compiled."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _all_modules(child)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run what is inside without compiled graphs."""
    _uncompiled.enter()
    try:
        yield
    finally:
        _uncompiled.leave()
