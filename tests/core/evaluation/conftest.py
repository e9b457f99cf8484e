from __future__ import annotations

from pathlib import Path

import pytest

from idadapter_core.evaluation.observe import Observer
from tests.core.evaluation.world import configure, write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three people, and all judging models."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def observer(world: Path) -> Observer:
    return Observer(configure(world, world), "cpu")
