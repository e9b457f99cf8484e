"""Make ComfyUI and diffusers importable where torchvision or torchaudio do not fit the installed torch."""

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

    Default: tests/shim, which does not touch working packages. `IDADAPTER_SHIM` sets another folder, or none if empty.
    """
    named = os.environ.get("IDADAPTER_SHIM")
    if named is None:
        return _SHIM
    return Path(named).resolve() if named else None


def run_shim() -> None:
    """Activate the shim in this process. Further calls have no effect.

    Python only runs it automatically in processes started with its folder on PYTHONPATH.
    """
    shim = shim_path()
    if shim is None or _NAME in sys.modules or _is_running(shim / "sitecustomize.py"):
        return
    import_file(_NAME, shim / "sitecustomize.py")


def import_file(name: str, path: Path) -> ModuleType:
    """Import a module from a file under a given name."""
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
