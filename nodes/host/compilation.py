"""Identities and torch.compile.

ComfyUI compiles a model without guards on `transformer_options`, so a graph compiled for one set of attention patches is
silently reused for another: the image is wrong, or the identity is missing. Model calls in which an identity acts therefore
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

COMPILE_KEY = "torch.compile"  # ComfyUI's key for the wrapper that swaps in compiled modules


class _Uncompiled:
    """Counter of the calls that need eager execution. The switch is process-wide, and calls may run in several threads."""

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
    """Return whether ComfyUI's compile node is active in a model call."""
    return bool(options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY))


def has_compiled_modules(unet: Any) -> bool:
    """Return whether a UNet, or any module in it, was compiled in some other way."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in _all_modules(unet))


def _all_modules(module: Any) -> Iterator[Any]:
    """Yield a module and all its descendants. `modules()` is not reliable: one pack patches it to hide compiled modules."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _all_modules(child)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager that runs its body without compiled graphs."""
    _uncompiled.enter()
    try:
        yield
    finally:
        _uncompiled.leave()
