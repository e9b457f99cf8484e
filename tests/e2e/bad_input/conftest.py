"""Files for single tests, and a look at what each test leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from idadapter_core.adapter import save_adapter
from tests.harness.server import ComfyServer
from tests.tiny.uniid import TINY_SDXL, tiny_adapter


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: ComfyServer) -> Iterator[None]:
    """No run leaves a file among the models, finished or not, unless its test takes care of it."""

    def files() -> set[Path]:
        return {path for path in server.models_dir.rglob("*") if path.is_file()}

    before = files()
    yield
    server.clear_history()  # of values that the browser tests, on the same server, could not read
    assert files() == before


@pytest.fixture
def put(server: ComfyServer) -> Iterator[Callable[[str], Path]]:
    """Paths for new files below models/, which are gone after the test."""
    made: list[Path] = []

    def path_of(name: str) -> Path:
        path = server.models_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
        return path

    yield path_of
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def other_recogniser(put: Callable[[str], Path], tmp_path: Path) -> str:
    """An adapter whose file says that it was trained with a recogniser that is not the one used here."""
    adapter = tiny_adapter(TINY_SDXL, tmp_path)
    path = put("idadapter/other_recogniser.safetensors")
    save_adapter(replace(adapter, config=replace(adapter.config, recognizer="0123456789abcdef")), path)
    return path.name
