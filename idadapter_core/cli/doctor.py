"""`python -m idadapter_core doctor`: says which programs and files are here, which work, and what each method still lacks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..doctor import (
    COMFYUI,
    DEMO_WORLD,
    PROGRAMS,
    ROOT,
    SELF_TEST,
    ModelFiles,
    SelfTest,
    examine,
    self_tested,
    text_of,
)
from ..errors import IDAdapterError, InputError
from .program import Parser, run

NECESSARY = (PROGRAMS, DEMO_WORLD, SELF_TEST)  # sections whose warnings are failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 1 if programs or the demo world do not work."""
    options = _parser().parse_args(arguments)
    return run(lambda: _report(options), interrupted="nothing was changed")


def _report(options: argparse.Namespace) -> int:
    comfyui: Path = options.comfyui or COMFYUI
    is_there = (comfyui / "main.py").is_file()
    if options.comfyui is not None and not is_there:
        raise InputError(f"--comfyui {comfyui}: there is no main.py in it; name the folder of your ComfyUI.")
    if options.self_test and not is_there:
        raise InputError("the self-test draws with ComfyUI: name its folder with --comfyui.")
    models = options.models or (comfyui / "models" if is_there else None)
    if models is not None and not models.is_dir():
        raise InputError(f"{models}: no such folder; name the `models` folder of your ComfyUI with --models.")
    sections = examine(ModelFiles() if models is None else ModelFiles.below(models), {})
    if options.self_test:
        sections.append(self_tested(lambda: _self_test(comfyui)))
    sys.stdout.write(text_of(sections))
    sys.stdout.write(
        "No model folder was searched: name that of your ComfyUI with --models.\n"
        if models is None
        else f"Searched: {models} and insightface's own folder. The node ID Adapter Doctor also knows extra_model_paths.yaml.\n"
    )
    return 0 if all(section.is_ok for section in sections if section.title in NECESSARY) else 1


def _self_test(comfyui: Path) -> SelfTest:
    """Draw in a process of its own, because ComfyUI takes a whole process for itself."""
    command = [sys.executable, str(ROOT / "nodes"), str(comfyui)]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    try:
        found = json.loads(result.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").rpartition("\n")[2]
        raise IDAdapterError(f"it ended with {reason}") from error
    if "error" in found:
        raise IDAdapterError(found["error"])
    return SelfTest(**found)


def _parser() -> Parser:
    parser = Parser(prog="python -m idadapter_core doctor", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "--comfyui",
        type=Path,
        help="folder of a ComfyUI (default: the one in whose custom_nodes this pack lies)",
    )
    parser.add_argument(
        "--models", type=Path, help="folder of model files (default: `models` of that ComfyUI)"
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="also draw a person of the demo world and measure the likeness: a few seconds",
    )
    return parser
