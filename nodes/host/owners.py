"""Names the origin of objects that other nodes put on a MODEL, for messages."""

from __future__ import annotations

import functools
import re
from typing import Any

_PACK = re.compile(r"custom_nodes[/\\]([^/\\]+)")
_FOLDER = re.compile(r"[/\\]([^/\\]+)$")  # for a pack outside custom_nodes


def owner_of(thing: Any) -> str:
    """Return the pack (its folder) or module of a callable, with the callable's name: "ComfyUI-PLADIS (attention)"."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = getattr(thing, "__func__", thing)
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(getattr(thing, "__module__", None) or type(thing).__module__)
    name = named.__qualname__.split(".<locals>")[0]
    if (pack := _PACK.search(module)) or (pack := _FOLDER.search(module)):
        # ComfyUI names a pack's module by its path, with dots replaced.
        module = pack[1].split(".")[0].replace("_x_", ".")
    return f"{module} ({name})"
