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
from idadapter_core.methods import METHODS

CORE = Path(idadapter_core.__file__).parent
PACK = CORE.parent
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
    ("doctor",),
    ("evaluation", "training", "demo_world"),  # none of them knows another
    ("data",),
    ("stable_diffusion",),
    ("adapter", "identity", "likeness_chart"),
    ("likeness",),
    ("formats", "recognizer"),
    ("methods",),
    ("mechanisms", "faces"),
    ("mixing", "resampler", "schedule", "strength", "placeholders", "logs"),
    ("attention",),
    ("fetch",),
    ("attention_cpu", "sites", "files", "config"),
    ("types", "waiting", "toml", "randomness", "extra", "statistics", "published"),
    ("encodings",),
    ("errors",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FOLDERS = {name for name in RANK if (CORE / name).is_dir()}
METHOD_FILES = ("config", "encoder", "files", "recipe")


def modules() -> list[Path]:
    return sorted(path.relative_to(CORE) for path in CORE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The line in LAYERS that a file belongs to: its folder, or its own name."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imports_of(file: Path, root: Path = PACK) -> set[tuple[str, ...]]:
    """Modules of the pack, and names in them, that a file imports: at its top or inside its functions."""
    found: set[tuple[str, ...]] = set()
    package = file.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "idadapter_core", (
                f"{file}: imports of the core are relative"
            )
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "idadapter_core" for alias in node.names), file
    return found


def module_of(name: tuple[str, ...], root: Path = PACK) -> Path | None:
    """The file of an imported module, or of the module that holds an imported name."""
    for parts in (name, name[:-1]):
        for file in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
            if parts and file.is_file():
                return file
    return None


def pack_files() -> list[Path]:
    """The core and the nodes."""
    return [*sorted(CORE.rglob("*.py")), *sorted((PACK / "nodes").rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in RANK, f"{part} has no place in the table of layers yet"
    for name in imports_of(CORE / path):
        assert name[0] == "idadapter_core", f"{path}: an import leaves the core"
        imported = name[1]
        allowed = RANK[imported] > RANK[part] or (imported == part and part in FOLDERS)
        assert allowed, f"{path} imports {imported}, which is not below it"


def test_the_table_notices_an_upward_import() -> None:
    below = {name[1] for name in imports_of(CORE / "adapter.py")}
    assert below >= {"formats", "errors", "methods", "sites", "types"}
    assert RANK["adapter"] < RANK["types"]


def test_no_import_circle() -> None:
    """Counted by files, the nodes included; a package that imports its own modules is above them."""
    below: dict[Path, set[Path]] = {}
    for file in pack_files():
        found = {module_of(name) for name in imports_of(file)}
        below[file] = {other for other in found if other is not None} - {file}
    done: set[Path] = set()

    def visit(file: Path, above: tuple[Path, ...]) -> None:
        assert file not in above, " imports ".join(str(f.relative_to(PACK)) for f in (*above, file))
        if file not in done:
            for other in below.get(file, ()):
                visit(other, (*above, file))
            done.add(file)

    for file in below:
        visit(file, ())


def test_nobody_but_methods_knows_a_method() -> None:
    """Not by an import, and not by comparing names."""
    for file in pack_files():
        if CORE / "methods" in file.parents:
            continue
        where = file.relative_to(PACK)
        for name in imports_of(file):
            of_one = name[:2] == ("idadapter_core", "methods") and len(name) > 2 and name[2] in METHODS
            assert not of_one, f"{where} imports {'.'.join(name)}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not compared & set(METHODS), f"{where}:{node.lineno} compares a method's name"


def test_mechanisms_know_no_method_and_have_a_file_in_both_hosts() -> None:
    for file in (CORE / "mechanisms").glob("*.py"):
        assert all(name[:2] != ("idadapter_core", "methods") for name in imports_of(file)), file
    mechanisms = {file.stem for file in (CORE / "mechanisms").glob("*.py")} - {"__init__"}
    for host in (PACK / "nodes" / "host", CORE / "stable_diffusion" / "inject"):
        assert mechanisms <= {file.stem for file in host.glob("*.py")}, host


def test_every_method_has_its_four_files() -> None:
    folders = {
        path.name for path in (CORE / "methods").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == set(METHODS)
    for name in METHODS:
        files = {file.stem for file in (CORE / "methods" / name).glob("*.py")}
        assert files == {"__init__", *METHOD_FILES}, name


def test_training_is_known_to_programs_alone() -> None:
    for folder in ("evaluation", "stable_diffusion", "data"):
        for file in (CORE / folder).rglob("*.py"):
            assert all(name[1] != "training" for name in imports_of(file)), file


def test_programs_are_imported_by_nobody() -> None:
    for file in pack_files():
        if CORE / "cli" in file.parents or file == CORE / "__main__.py":
            continue
        assert all(name[:2] != ("idadapter_core", "cli") for name in imports_of(file)), file


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
