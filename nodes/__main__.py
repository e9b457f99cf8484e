"""Runs the doctor's self-test in ComfyUI's own code, without its server: `python nodes COMFYUI`. Prints the result as JSON.

`python -m idadapter_core doctor --self-test` starts it: the core does not import ComfyUI.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
NAME = "comfyui_idadapter"


def device_options() -> list[str]:
    """Options of ComfyUI for this machine: without an accelerator it starts with `--cpu` only."""
    import torch

    has_accelerator = hasattr(torch, "accelerator") and torch.accelerator.is_available()
    return [] if has_accelerator or torch.cuda.is_available() else ["--cpu"]


def main() -> None:
    """Load ComfyUI and this pack as the server does, and draw."""
    sys.path[0] = str(
        Path(sys.argv[1]).resolve()
    )  # in place of this folder, whose names are not meant to be importable
    with tempfile.TemporaryDirectory() as base:
        import comfy.options

        comfy.options.enable_args_parsing()
        sys.argv = ["main.py", *device_options(), "--base-directory", base]
        import comfy.cli_args  # noqa: F401 - reads sys.argv once, on import

        spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
        doctor = importlib.import_module(f"{NAME}.nodes.doctor")
        try:
            found = asdict(doctor.run_self_test())
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
