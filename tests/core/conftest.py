"""What tests of the core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.harness.shim import run_shim
from tests.tiny.toy import Toy, write_toy


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Where tensors are tiny, waking a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Material of tiny runs, made once."""
    run_shim()
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    run_shim()
    return write_toy(tmp_path_factory.mktemp("toy_sdxl"), "sdxl")
