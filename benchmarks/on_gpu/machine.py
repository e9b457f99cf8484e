"""The measuring process: imports ComfyUI as on a user's machine, and describes the machine."""

from __future__ import annotations

import logging
import platform
import subprocess
from importlib import metadata
from typing import Any

from benchmarks.on_gpu.parts import Report, Sizes
from tests.harness.comfy import REPOSITORY, comfyui_path, import_comfy, load_pack

MEGABYTE, GIGABYTE = 1e6, 1e9


def start(dynamic: bool = False, cpu: bool = False) -> None:
    """Import ComfyUI and the pack: on the GPU if there is one, with dynamic VRAM only if requested.

    Raises:
        RuntimeError: there is a GPU, and dynamic VRAM does not work on it.
    """
    if dynamic:
        # Before torch, as in ComfyUI's main.py.
        import comfy_aimdo.control

        comfy_aimdo.control.init(nvml_pressure=True)
    import torch

    has_gpu = torch.cuda.is_available() and not cpu
    flag = "--enable-dynamic-vram" if dynamic else "--disable-dynamic-vram"
    import_comfy(options=[flag] if has_gpu else ["--cpu"])
    if dynamic and has_gpu:
        _enable_dynamic_vram()
    load_pack()
    logging.getLogger().setLevel(logging.ERROR)  # the messages repeated in every run


def _enable_dynamic_vram() -> None:
    """Repeat the setup of ComfyUI's main.py."""
    import comfy.memory_management
    import comfy.model_management as memory
    import comfy.model_patcher
    import comfy_aimdo.control
    from comfy.cli_args import args

    headroom = int(args.vram_headroom * 1024**3)
    if not comfy_aimdo.control.init_devices(
        (device.index, headroom) for device in memory.get_all_torch_devices()
    ):
        raise RuntimeError("comfy-aimdo does not work on this machine, so there is no dynamic VRAM")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def device() -> Any:
    """ComfyUI's device."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def synchronise() -> None:
    """Wait until the device is idle."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(sizes: Sizes, report: Report) -> None:
    """Report the machine and versions of all measurements.

    Raises:
        RuntimeError: real sizes without a CUDA device.
    """
    import torch

    if not sizes.tiny and not torch.cuda.is_available():
        raise RuntimeError(
            "PyTorch sees no CUDA device here. Try the measurements with --tiny, or run them on a machine with a GPU"
        )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    versions = {
        package: _version(package)
        for package in ("comfy-aimdo", "onnxruntime", "onnxruntime-gpu", "diffusers")
    }
    report(
        {
            "device": name,
            "memory, GB": torch.cuda.get_device_properties(0).total_memory / GIGABYTE
            if torch.cuda.is_available()
            else None,
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "ComfyUI": _comfyui_version(),
            **versions,
            "commit": _commit(),
            "sizes": "tiny" if sizes.tiny else "real",
        }
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _comfyui_version() -> str:
    path = comfyui_path()
    file = path / "comfyui_version.py" if path is not None else None
    if file is None or not file.is_file():
        return "unknown"
    return (
        file.read_text(encoding="utf-8").partition("__version__ =")[2].strip().splitlines()[0].strip("\"' ")
    )


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
