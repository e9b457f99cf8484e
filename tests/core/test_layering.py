"""The core is pure torch, and its modules import downwards only."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import idadapter_core

CORE = Path(idadapter_core.__file__).parent
HEAVY = (
    "comfy",
    "comfy_api",
    "folder_paths",
    "nodes",
    "insightface",
    "onnxruntime",
    "onnx",
    "cv2",
    "transformers",
    "diffusers",
    "numba",
    "anny",
    "pydantic",
    "jinja2",
    "matplotlib",
)

# From the top down: a module imports from lines below its own only.
LAYERS = (
    ("__init__", "__main__"),
    ("cli",),
    ("evaluation", "training", "demo_world"),  # none of them knows another
    ("data",),
    ("stable_diffusion",),
    ("checkpoint",),
    ("formats", "recognizer"),
    ("methods",),
    ("faces",),
    ("mixing", "resampler", "schedule", "prompts", "logs"),
    ("attention", "sites", "files", "config"),
    ("types", "waiting", "toml", "randomness", "extra"),
    ("encodings",),
    ("errors",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SIBLINGS = {name for name in RANK if (CORE / name).is_dir()}


def modules() -> list[Path]:
    return sorted(path.relative_to(CORE) for path in CORE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The line in LAYERS that a file belongs to: its folder, or its own name."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported_parts(path: Path) -> set[str]:
    """Parts of the core that a file imports, at its top or inside its functions."""
    found: set[str] = set()
    package = ("idadapter_core", *path.parts[:-1])
    for node in ast.walk(ast.parse((CORE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = (
                [(*base, *node.module.split("."))] if node.module else [(*base, a.name) for a in node.names]
            )
            assert base, f"{path}: an import leaves the core"
            found |= {name[1] for name in names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "idadapter_core", (
                f"{path}: imports of the core are relative"
            )
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "idadapter_core" for alias in node.names), path
    return found


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in RANK, f"{part} has no place in the table of layers yet"
    for imported in imported_parts(path):
        allowed = RANK[imported] > RANK[part] or (imported == part and part in SIBLINGS)
        assert allowed, f"{path} imports {imported}, which is not below it"


def test_the_table_notices_an_upward_import() -> None:
    assert imported_parts(Path("checkpoint.py")) >= {"formats", "errors", "methods", "sites", "types"}
    assert imported_parts(Path("methods/uniid.py")) >= {"errors", "mixing", "resampler", "types"}
    assert RANK["checkpoint"] < RANK["types"]


@pytest.mark.parametrize(
    "module",
    [
        "idadapter_core",
        "idadapter_core.cli.convert",
        "idadapter_core.demo_world",
        "idadapter_core.faces",
        "idadapter_core.stable_diffusion.inject",
    ],
)
def test_importing_the_core_loads_no_host_and_no_face_library(module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    environment = {**os.environ, "PYTHONPATH": str(CORE.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CORE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(result.stdout))
    assert {"idadapter_core", "torch"} <= loaded
    assert not loaded & set(HEAVY)


def test_these_tests_need_no_host() -> None:
    folder = Path(__file__).parent
    for path in folder.rglob("test_*.py"):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {
                "comfy",
                "comfy_api",
                "folder_paths",
                "nodes",
            }, path


def test_everything_promised_is_importable() -> None:
    for name in idadapter_core.__all__:
        assert hasattr(idadapter_core, name)
    assert list(idadapter_core.__all__) == sorted(idadapter_core.__all__)
