"""Short names for the pack's exceptions.

ComfyUI prefixes the name of every exception that is not built in with its module, which for a custom node is a folder path.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from typing import Any

from ...idadapter_core.errors import IDAdapterError


def use_short_names() -> None:
    """Make ComfyUI show "InputError" and not "/…/custom_nodes/…/errors.InputError".

    Only the classes of this process change. They can still be pickled: a registered reducer finds them, because pickle would
    look them up in builtins. Calling it twice is harmless.
    """
    for error in _family(IDAdapterError):
        error.__module__ = "builtins"
        copyreg.pickle(error, _reduce)


def _family(error: type[IDAdapterError]) -> Iterator[type[IDAdapterError]]:
    yield error
    for child in error.__subclasses__():
        yield from _family(child)


def _reduce(error: IDAdapterError) -> tuple[Any, ...]:
    return _rebuild, (type(error).__qualname__, error.args), error.__dict__ or None


def _rebuild(name: str, arguments: tuple[Any, ...]) -> IDAdapterError:
    found = next(error for error in _family(IDAdapterError) if error.__qualname__ == name)
    return found(*arguments)
