"""What lets ComfyUI and diffusers be imported where torchvision or torchaudio do not fit the installed torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_SHIM = Path(__file__).resolve().parents[1] / "shim"
_NAME = "comfyui_shim"


def shim_path() -> Path | None:
    """The folder of the shim.

    It is tests/shim, which leaves alone what works. `IDADAPTER_SHIM` names another one; empty, it means none.
    """
    named = os.environ.get("IDADAPTER_SHIM")
    if named is None:
        return _SHIM
    return Path(named).resolve() if named else None


def run_shim() -> None:
    """Have the shim at work in this process. Doing it twice is harmless.

    Python runs it by itself only in processes that start with its folder on PYTHONPATH.
    """
    shim = shim_path()
    if shim is None or _NAME in sys.modules or _is_running(shim / "sitecustomize.py"):
        return
    import_file(_NAME, shim / "sitecustomize.py")


def import_file(name: str, path: Path) -> ModuleType:
    """A module from a file, registered under a name of our choice."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_running(sitecustomize: Path) -> bool:
    file = getattr(sys.modules.get("sitecustomize"), "__file__", None)
    return file is not None and Path(file).resolve() == sitecustomize
