"""Networks and photos, loaded once for all tests of a forward pass."""

from __future__ import annotations

import pytest

from idadapter_core.training.config import RunConfig
from idadapter_core.training.parts import Parts, load_parts
from idadapter_core.training.samples import Batch
from tests.core.training.bundle.passes import KINDS, batch_of
from tests.tiny.toy import Toy


@pytest.fixture(scope="session")
def parts(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Of all runs here: what they load differs in nothing but the detector, which is there."""
    loss = {"gate": "detector"}
    return load_parts(toy.config(tmp_path_factory.mktemp("run"), loss=loss))


@pytest.fixture(scope="session")
def configs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("run")
    off = {"loss": {"identity": 0.0}}
    return {name: toy.config(folder, **off, **sections) for name, sections in KINDS.items()}


@pytest.fixture(scope="session")
def batch(parts: Parts, configs: dict[str, RunConfig]) -> Batch:
    """Four photos of four people with the features for IDAdapter; the identity of the last one is dropped."""
    return batch_of(parts, configs["idadapter"])


@pytest.fixture(scope="session")
def faces(parts: Parts, configs: dict[str, RunConfig]) -> Batch:
    """The same photos with the features for UniID."""
    return batch_of(parts, configs["uniid"])
