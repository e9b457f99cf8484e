"""Run ComfyUI inside the test process, and import the pack the way ComfyUI does."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.harness.shim import import_file, run_shim

REPOSITORY = Path(__file__).resolve().parents[2]
PACK_MODULE = "ComfyUI_IDAdapter"
"""Module name of the pack after `load_pack`: import parts of it as `ComfyUI_IDAdapter.nodes.faces`."""

PINNED = REPOSITORY / ".cache" / "ComfyUI-0.30.0"


def comfyui_path() -> Path | None:
    """The ComfyUI to test against: `COMFYUI_PATH`, else the pinned one below .cache; None if there is none.

    Raises:
        FileNotFoundError: `COMFYUI_PATH` is set to a folder without main.py.
    """
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return PINNED if (PINNED / "main.py").is_file() else None
    path = Path(named).resolve()
    if not (path / "main.py").is_file():
        raise FileNotFoundError(
            f"COMFYUI_PATH is {named}, which has no main.py. Point it at a ComfyUI folder."
        )
    return path


def import_comfy(path: Path | None = None, options: Sequence[str] = ("--cpu",)) -> None:
    """Make `import comfy` and ComfyUI's other modules work in this process. Further calls have no effect.

    ComfyUI gets an empty, separate base directory, removed at exit, and the command line `options`: by default it runs on the CPU.

    Raises:
        RuntimeError: no ComfyUI is known.
    """
    if "comfy" in sys.modules:
        return
    path = path or comfyui_path()
    if path is None:
        raise RuntimeError("No ComfyUI found. Set COMFYUI_PATH to its folder.")
    base = Path(tempfile.mkdtemp(prefix="comfyui-in-process-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)

    run_shim()
    # Before the repository: ComfyUI's nodes.py must take precedence over the pack's folder nodes/.
    sys.path.insert(0, str(path.resolve()))

    import comfy.options

    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, ["main.py", *options, "--base-directory", str(base)]
    try:
        import comfy.cli_args  # noqa: F401 - reads sys.argv once, on import
    finally:
        sys.argv = arguments

    from tests.tiny.tiny_pack import register

    register()


@functools.cache
def load_pack() -> ModuleType:
    """Import the pack by path under the name `PACK_MODULE`, as ComfyUI's custom node loader does."""
    import_comfy()
    return import_file(PACK_MODULE, REPOSITORY / "__init__.py")


@functools.cache
def pack_nodes() -> dict[str, Any]:
    """The pack's node classes by node id, from its `comfy_entrypoint`."""

    async def collect() -> list[Any]:
        extension = await load_pack().comfy_entrypoint()
        await extension.on_load()
        return list(await extension.get_node_list())

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(collect())}
