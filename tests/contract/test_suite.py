"""The suite itself: it covers whatever is registered, names no method, and touches the package in two files only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.contract.samples import CASES, FAMILIES, METHOD_NAMES, title_of

FOLDER = Path(__file__).parent
PACKAGES = {"idadapter_core", "ComfyUI_IDAdapter", "nodes"}
DOORS = {"hosts.py", "samples.py"}
FILES = sorted(FOLDER.glob("*.py"))


def test_every_method_is_run_for_every_family() -> None:
    assert {(case.method, case.family) for case in CASES} == {(m, f) for m in METHOD_NAMES for f in FAMILIES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_the_doors_import_the_package(file: Path) -> None:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    assert file.name in DOORS or not found & PACKAGES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_method_is_named(file: Path) -> None:
    """Neither as a text nor as a module that is imported."""
    names = {*METHOD_NAMES, *map(title_of, METHOD_NAMES)}
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    assert not found & names
