"""Other packs in this process, loaded and called as ComfyUI does it."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any


def packs_path() -> Path | None:
    """The folder with checkouts of other packs that `PACKS_PATH` names; None where it is not set."""
    named = os.environ.get("PACKS_PATH")
    return Path(named).resolve() if named else None


def host() -> None:
    """Have a PromptServer, which packs expect at import, without starting it. Doing it twice is harmless."""
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        PromptServer(loop)


def load(folder: Path) -> dict[str, Any]:
    """The node classes that ComfyUI has after loading the pack in this folder. RuntimeError when it does not import."""
    import nodes

    host()
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    keep = Keep(logging.WARNING)
    logging.getLogger().addHandler(keep)
    try:
        loaded = asyncio.run(nodes.load_custom_node(str(folder)))
    finally:
        logging.getLogger().removeHandler(keep)
    if not loaded:
        raise RuntimeError("\n".join(records))
    return dict(nodes.NODE_CLASS_MAPPINGS)


def call(node_class: Any, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a node, of either of ComfyUI's two kinds."""
    import torch

    with torch.inference_mode():
        if hasattr(node_class, "execute") and hasattr(node_class, "GET_SCHEMA"):
            return tuple(node_class.execute(**inputs).result)
        return tuple(getattr(node_class(), node_class.FUNCTION)(**inputs))
