"""Other packs in this process, loaded and called as ComfyUI does it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = "PACKS_PATH"
"""Environment variable: a folder with checkouts of other packs, each in a folder of its repository's name."""


def packs_folder() -> Path | None:
    """The folder that `PACKS_PATH` names; None where it is not set.

    Raises:
        FileNotFoundError: it is set to something that is no folder.
    """
    named = os.environ.get(FOLDER)
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{FOLDER} is {named}, which is no folder. Point it at a folder with checkouts of other packs."
        )
    return folder


class PackError(RuntimeError):
    """A pack that does not import in this ComfyUI; the message is its own last words."""


class Host:
    """ComfyUI in this process with some packs. ComfyUI must be importable (see `tests/harness/comfy.py`)."""

    def __init__(self, packs: Path) -> None:
        from server import PromptServer

        import nodes

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        PromptServer(loop)  # packs add routes to it when they are imported; it is never started
        asyncio.run(nodes.init_builtin_extra_nodes())
        self.packs = packs
        self._loaded: dict[tuple[str, ...], Any] = {}
        # Some packs import themselves as custom_nodes.<folder>.
        self._parent = Path(tempfile.mkdtemp(prefix="packs-")) / "custom_nodes"
        self._parent.mkdir()
        sys.path.append(str(self._parent.parent))

    @property
    def models(self) -> Path:
        import folder_paths

        return Path(folder_paths.models_dir)

    @property
    def node_classes(self) -> dict[str, Any]:
        import nodes

        classes: dict[str, Any] = nodes.NODE_CLASS_MAPPINGS
        return classes

    def load(self, name: str) -> None:
        """Load the pack in the folder of this name.

        Raises:
            PackError: it does not import.
        """
        import nodes

        link = self._parent / name
        link.symlink_to(self.packs / name, target_is_directory=True)
        said = _Said()
        logging.getLogger().addHandler(said)
        try:
            loaded = asyncio.run(nodes.load_custom_node(str(link)))
        finally:
            logging.getLogger().removeHandler(said)
        if not loaded:
            raise PackError(said.last_line.rpartition("for custom nodes: ")[2])

    def module_of(self, node: str) -> Any:
        """The module that defines a node."""
        return sys.modules[self.node_classes[node].__module__]

    def call(self, node: str, **inputs: Any) -> Any:
        """The first output of a node, of either of ComfyUI's two kinds."""
        return self.outputs(node, **inputs)[0]

    def load_model(self, node: str, **file: str) -> Any:
        """The output of a node that loads a file; kept, as ComfyUI keeps it between two runs."""
        key = (node, *file.values())
        if key not in self._loaded:
            self._loaded[key] = self.call(node, **file)
        return self._loaded[key]

    def outputs(self, node: str, **inputs: Any) -> tuple[Any, ...]:
        """All outputs of a node."""
        import torch

        node_class = self.node_classes[node]
        with torch.inference_mode():
            if hasattr(node_class, "GET_SCHEMA") and hasattr(node_class, "execute"):
                output = node_class.execute(**inputs)
                return tuple(getattr(output, "result", output))
            return tuple(getattr(node_class(), node_class.FUNCTION)(**inputs))


class _Said(logging.Handler):
    """Keeps the last line that was logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last_line = "it gave no reason"

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if lines:
            self.last_line = lines[-1]
