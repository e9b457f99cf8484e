"""Files that an earlier release wrote are read with the same digests and mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.hosts import HOSTS, host_of
from tests.contract.old_files import PHOTOS, SEED, OldFiles, old_files, predict, predictions
from tests.contract.samples import (
    DATA,
    FAMILIES,
    METHOD_NAMES,
    SMALLEST,
    Case,
    features,
    read_file,
    tokens,
    tokens_digest,
)

LARGEST = 100_000  # bytes


@pytest.fixture(params=old_files(), ids=lambda old: old.method, scope="module")
def old(request: pytest.FixtureRequest) -> OldFiles:
    found: OldFiles = request.param
    return found


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__, scope="module")
def reader(request: pytest.FixtureRequest, comfyui: Path) -> Any:
    return host_of(request.param, FAMILIES[0], comfyui)


def test_there_are_files_and_their_methods_are_still_known() -> None:
    methods = [old.method for old in old_files()]
    assert methods
    assert set(methods) <= set(METHOD_NAMES)
    assert all(path.stat().st_size < LARGEST for path in DATA.iterdir())


def test_they_have_the_digests_that_they_had(old: OldFiles, reader: Any) -> None:
    adapter = reader.load(DATA / old.adapter)
    assert reader.digest(adapter) == old.adapter_digest
    for name, digest in zip(old.identities, old.tokens_digests, strict=True):
        identity = reader.load_identity(DATA / name, adapter)
        assert identity.adapter == old.adapter_digest
        assert tokens_digest(identity) == digest


def test_the_old_adapter_still_makes_the_old_identities(old: OldFiles, reader: Any) -> None:
    adapter = reader.load(DATA / old.adapter)
    for photos, file in zip(PHOTOS, old.identities, strict=True):
        found = reader.encode(adapter, features(SEED, photos, SMALLEST.vision))
        expected = reader.load_identity(DATA / file, adapter)
        for name in ("method", "adapter", "recognizer", "class_word"):
            assert getattr(found, name) == getattr(expected, name), name
        # Identities of before have no embedding, which acts in no picture.
        assert tokens(found).keys() - {"embedding"} == tokens(expected).keys() - {"embedding"}
        for name, tensor in tokens(expected).items():
            torch.testing.assert_close(tokens(found)[name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", predictions())
@pytest.mark.parametrize("kind", HOSTS, ids=lambda host: host.__name__)
def test_the_unet_still_predicts_the_same(kind: Any, case: str, comfyui: Path) -> None:
    method, family = case.rsplit("-", 1)
    found, expected = predict(host_of(kind, family, comfyui), Case(method, family)), predictions()[case]
    difference = float((found - expected).abs().max())
    print(f"{case}: largest difference {difference:.2e}, of values up to {float(expected.abs().max()):.2f}")
    assert difference <= 1e-4


def test_what_is_written_today_holds_all_that_the_old_files_held(
    old: OldFiles, reader: Any, tmp_path: Path
) -> None:
    """So that the earlier release can read it, but for settings that it did not have."""
    adapter = reader.load(DATA / old.adapter)
    written = [reader.save_adapter(adapter, tmp_path / old.adapter)]
    for name in old.identities:
        identity = reader.load_identity(DATA / name, adapter)
        written.append(reader.save_identity(identity, tmp_path / name))
    for file in written:
        (tensors, metadata), (before, said) = read_file(file), read_file(DATA / file.name)
        assert tensors.keys() == before.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
        config, old_config = (json.loads(facts.pop("config", "{}")) for facts in (metadata, said))
        assert metadata == said
        assert {name: config[name] for name in old_config} == old_config
