"""A tiny adapter, its weights and an identity of it, for the tests of their files."""

from __future__ import annotations

import pytest

from idadapter_core.adapter import Adapter
from idadapter_core.types import Identity
from tests.core.adapter_files.writing import State
from tests.tiny.features import face_features
from tests.tiny.uniid import TINY_SD15, tiny_adapter, uniid_state


@pytest.fixture(scope="session")
def state() -> State:
    return uniid_state(TINY_SD15)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(TINY_SD15, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def identity(adapter: Adapter) -> Identity:
    return adapter.encode(face_features(1))
