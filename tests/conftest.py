"""Fixtures that bring the real ComfyUI; tests that use them are skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness.comfy import comfyui_path, import_comfy, load_pack
from tests.harness.server import ComfyServer, Writer, bring_tiny_checkpoints
from tests.tiny.files import (
    bring_adapters,
    bring_clip_vision,
    bring_face_package,
    bring_idadapters,
    bring_loras,
    bring_photos,
    bring_recognizer,
)

# Run on the base directory of the shared server before it starts: append here what brings further models or inputs.
SERVER_FILES: list[Writer] = [
    bring_tiny_checkpoints,
    bring_loras,
    bring_adapters,
    bring_idadapters,
    bring_clip_vision,
    bring_recognizer,
    bring_face_package,
    bring_photos,
]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Folder of the ComfyUI under test."""
    path = comfyui_path()
    if path is None:
        pytest.skip(
            "no ComfyUI: set COMFYUI_PATH to its folder, or run `python tasks.py test`, which fetches it"
        )
    return path


@pytest.fixture(scope="session")
def server(comfyui: Path) -> Iterator[ComfyServer]:
    """One server for the whole run, with the pack and the files of `SERVER_FILES`."""
    with ComfyServer(comfyui, writers=SERVER_FILES) as running:
        yield running


@pytest.fixture(scope="session")
def comfy(comfyui: Path) -> None:
    """ComfyUI importable in this process, on the CPU."""
    import_comfy(comfyui)


@pytest.fixture(scope="session")
def pack(comfy: None) -> ModuleType:
    """The pack as ComfyUI imports it. Its parts are `ComfyUI_IDAdapter.nodes.faces` and so on."""
    return load_pack()
