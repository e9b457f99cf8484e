from __future__ import annotations

from pathlib import Path

import pytest

from idadapter_core.faces.detector import FaceAnalyzer, open_analyzer
from tests.tiny.face_package import write_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete tiny package."""
    return write_package(tmp_path_factory.mktemp("insightface") / "models" / "buffalo_l")


@pytest.fixture(scope="session")
def analyzer(package: Path) -> FaceAnalyzer:
    return open_analyzer(package, "cpu", recognition=True)
