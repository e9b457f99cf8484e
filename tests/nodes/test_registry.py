"""pyproject.toml, as ComfyUI reads it for its registry."""

from __future__ import annotations

import sys
from fnmatch import fnmatch

from tests.harness.comfy import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_comfyui_reads_the_project() -> None:
    from comfy_config.config_parser import extract_node_configuration

    config = extract_node_configuration(str(REPOSITORY))
    assert config is not None
    assert config.project.name == "comfyui-idadapter"
    assert config.project.version
    assert config.tool_comfy.publisher_id
    assert config.tool_comfy.display_name
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert config.project.dependencies == required


def test_all_files_of_the_core_are_installed_with_it() -> None:
    """`pip install .` takes modules, and of other files those that the project names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    named: dict[str, list[str]] = project["tool"]["setuptools"]["package-data"]
    core = REPOSITORY / "idadapter_core"
    found = [path for path in core.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    others = [path for path in found if path.suffix != ".py"]
    assert any(path.suffix == ".jinja" for path in others)
    patterns = [
        pattern if package == "*" else f"{package.replace('.', '/')}/{pattern}"
        for package, listed in named.items()
        for pattern in listed
    ]
    for path in others:
        name = path.relative_to(REPOSITORY).as_posix()
        assert any(fnmatch(name, pattern) or fnmatch(path.name, pattern) for pattern in patterns), name
