"""Material of tiny runs, made once."""

from __future__ import annotations

import pytest

from tests.harness.shim import run_shim
from tests.tiny.toy import Toy, write_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    run_shim()
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    run_shim()
    return write_toy(tmp_path_factory.mktemp("toy_sdxl"), "sdxl")
