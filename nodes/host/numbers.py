"""Checks of numeric inputs. ComfyUI checks typed numbers, but accepts NaN, and does not check numbers from other nodes."""

from __future__ import annotations

import functools
import inspect
import math
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ...idadapter_core.errors import InputError
from .messages import Message, show, warning

_refused: set[str] = set()  # ids of nodes that show an error message


def checks_numbers(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Class decorator: `execute` raises InputError for invalid numbers in its inputs."""
    execute = vars(node)["execute"].__func__
    signature = inspect.signature(execute)

    @functools.cache
    def schema() -> io.Schema:
        return node.define_schema()

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(cls, *args, **kwargs).arguments
        title = str(schema().display_name)
        if fault := _fault_of(schema(), given):
            _report(title, [warning(fault)])
            raise InputError(f"{title}: {fault}")
        _report(title, [])
        return execute(cls, *args, **kwargs)

    setattr(node, "execute", classmethod(checked))  # noqa: B010 (mypy refuses to assign to a method)
    return node


def _fault_of(schema: io.Schema, given: dict[str, Any]) -> str:
    """Describe the first invalid number; empty if all are valid."""
    for entry in schema.inputs:
        if not isinstance(entry, io.Float.Input | io.Int.Input) or entry.id not in given:
            continue
        value = given[entry.id]
        if value is None and entry.optional:
            continue
        if wanted := _wanted(entry, value):
            return (
                f"{entry.id} must be {wanted}, got {_shown(value)}. Enter a number from {entry.min:g} to {entry.max:g}, or repair the "
                "node that is wired to it."
            )
    return ""


def _wanted(entry: io.Float.Input | io.Int.Input, value: object) -> str:
    """Describe the value that an input requires; empty if `value` is valid.

    A float from another node may lie outside the range of the widget and is taken as it is.
    """
    if isinstance(entry, io.Int.Input):
        whole = isinstance(value, Integral) and entry.min <= int(value) <= entry.max
        return "" if whole else "a whole number in its range"
    if not isinstance(value, Real):
        return "a number"
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        finite = False
    return "" if finite else "a finite number"


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _report(title: str, messages: list[Message]) -> None:
    """Show an error message on the running node, or clear it.

    ComfyUI's own error report quotes the values, and a NaN in it makes it unreadable for browsers.
    """
    context = get_executing_context()
    if context is None or (not messages and context.node_id not in _refused):
        return
    show(context.node_id, title, "run", messages)
    if messages:
        _refused.add(context.node_id)
    else:
        _refused.discard(context.node_id)
