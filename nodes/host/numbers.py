"""Numbers that reach a node: ComfyUI checks those that were typed in, but lets NaN pass, and none that come from another node."""

from __future__ import annotations

import functools
import inspect
import math
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ...idadapter_core.errors import InputError
from .messages import Message, say, warning

_refused: set[str] = set()  # ids of nodes that show a refusal


def checks_numbers(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node class, whose `execute` now refuses numbers that its inputs cannot mean (InputError)."""
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
            _tell(title, [warning(fault)])
            raise InputError(f"{title}: {fault}")
        _tell(title, [])
        return execute(cls, *args, **kwargs)

    setattr(node, "execute", classmethod(checked))  # noqa: B010 (mypy refuses to assign to a method)
    return node


def _fault_of(schema: io.Schema, given: dict[str, Any]) -> str:
    """What is wrong with the first number that is wrong; empty where all can be used."""
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
    """What a value should be instead; empty where it can be used.

    A float outside the range that the widget offers can come from another node, and means what it says.
    """
    if isinstance(entry, io.Int.Input):
        whole = isinstance(value, Integral) and entry.min <= int(value) <= entry.max
        return "" if whole else "a whole number in its range"
    if not isinstance(value, Real):
        return "a number"
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        finite = False
    return "" if finite else "a finite number"


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _tell(title: str, messages: list[Message]) -> None:
    """Show a refusal on the node that runs, or take it away again.

    ComfyUI's own report of an error quotes the values, and with NaN in it no browser can read it.
    """
    context = get_executing_context()
    if context is None or (not messages and context.node_id not in _refused):
        return
    say(context.node_id, title, "run", messages)
    if messages:
        _refused.add(context.node_id)
    else:
        _refused.discard(context.node_id)
