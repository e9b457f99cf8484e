"""Identity files: nothing is lost, and a failing write leaves the old file and nothing else."""

from __future__ import annotations

import dataclasses
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.adapter import Adapter, save_adapter
from idadapter_core.errors import CheckpointError, MismatchError
from idadapter_core.identity import identical, load_identity, save_identity
from idadapter_core.types import Identity
from tests.core.adapter_files.writing import State, files_below, read_own, write
from tests.golden import recipe
from tests.tiny.uniid import TINY_SDXL, tiny_adapter

# --- identities ------------------------------------------------------------------------------------------------------


def test_identity_keeps_everything(identity: Identity, tmp_path: Path) -> None:
    identity = dataclasses.replace(identity, class_word="woman")
    save_identity(identity, tmp_path / "person.safetensors")
    again = load_identity(tmp_path / "person.safetensors")
    assert identical(again, identity)
    assert (again.method, again.adapter, again.recognizer) == ("uniid", identity.adapter, identity.recognizer)
    assert again.class_word == "woman"


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_tokens": None, "adapter_tokens_uncond": None},
        {"adapter_tokens_uncond": None},
        {"text_tokens": {}},
    ],
)
def test_partial_identities(identity: Identity, tmp_path: Path, changes: dict[str, Any]) -> None:
    partial = dataclasses.replace(identity, **changes)
    save_identity(partial, tmp_path / "person.safetensors")
    again = load_identity(tmp_path / "person.safetensors")
    assert identical(again, partial)
    assert not identical(again, identity)


def test_tokens_may_share_their_memory(tmp_path: Path) -> None:
    tokens = recipe.value(1, "tokens", (1, 4, 8))
    shared = Identity(tokens, tokens, {"l": tokens[:, :2]})
    save_identity(shared, tmp_path / "person.safetensors")
    assert identical(load_identity(tmp_path / "person.safetensors"), shared)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "other"},
        {"adapter": "other"},
        {"recognizer": "other"},
        {"class_word": "man"},
        {"adapter_tokens": torch.zeros(1, 25, 64)},
        {"adapter_tokens": torch.zeros(1, 24, 64)},
        {"adapter_tokens": None},
        {"adapter_tokens_uncond": None},
        {"text_tokens": {}},
        {"text_tokens": {"l": torch.zeros(1, 3, 64)}},
    ],
)
def test_identical_sees_every_difference(identity: Identity, changes: dict[str, Any]) -> None:
    other = dataclasses.replace(identity, **changes)
    assert not identical(identity, other)
    assert not identical(other, identity)
    assert identical(identity, dataclasses.replace(identity, text_tokens=dict(identity.text_tokens)))


def test_files_that_are_no_identities(identity: Identity, state: State, tmp_path: Path) -> None:
    path = tmp_path / "person.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"person\.safetensors: not an identity file of this project"):
        load_identity(path)
    with pytest.raises(CheckpointError, match="not an identity file of this project"):
        load_identity(write(tmp_path / "x.bin", state))
    save_identity(identity, path)
    tensors, metadata = read_own(path)
    save_file(tensors, path, {**metadata, "format_version": "2"})
    with pytest.raises(CheckpointError, match="written in format version 2"):
        load_identity(path)
    save_file(
        tensors, path, {key: value for key, value in metadata.items() if key not in ("adapter", "method")}
    )
    with pytest.raises(CheckpointError, match="its metadata lacks method, adapter"):
        load_identity(path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        load_identity(tmp_path / "absent.safetensors")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_failing_write_keeps_the_old_file_and_leaves_nothing(
    adapter: Adapter, identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_identity(identity, tmp_path / "person.safetensors")
    old = (tmp_path / "person.safetensors").read_bytes()

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full_disk)
    changed = dataclasses.replace(identity, class_word="man")
    with pytest.raises(
        CheckpointError, match=r"person\.safetensors: cannot be written .*No space left on device"
    ):
        save_identity(changed, tmp_path / "person.safetensors")
    with pytest.raises(CheckpointError, match=r"new\.safetensors: cannot be written"):
        save_adapter(adapter, tmp_path / "new.safetensors")
    assert files_below(tmp_path) == ["person.safetensors"]
    assert (tmp_path / "person.safetensors").read_bytes() == old


def test_interrupting_a_write_leaves_nothing(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_identity(identity, tmp_path / "person.safetensors")
    assert files_below(tmp_path) == []


def test_places_that_cannot_be_written(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "file" / "person.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(CheckpointError, match=r"cannot be written .*Choose another folder"):
            save_identity(identity, path)
    assert files_below(tmp_path) == ["file"]


def test_folders_are_made_and_files_replaced(identity: Identity, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "person.safetensors"
    save_identity(dataclasses.replace(identity, class_word="man"), path)
    save_identity(identity, path)
    assert identical(load_identity(path), identity)
    assert files_below(tmp_path) == ["person.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="file modes of POSIX")
def test_written_files_have_the_usual_mode(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save_identity(identity, tmp_path / "person.safetensors")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "person.safetensors")]
    assert modes[0] == modes[1]


# --- does the adapter fit? -------------------------------------------------------------------------------------------


def test_identities_fit_their_own_adapter_only(adapter: Adapter, identity: Identity, tmp_path: Path) -> None:
    adapter.require_identity(identity, "person")
    other = tiny_adapter(TINY_SDXL, tmp_path)
    with pytest.raises(
        MismatchError, match=f"person was made with another adapter .*{identity.adapter}.*{other.digest}"
    ):
        other.require_identity(identity, "person")
    trained = dataclasses.replace(
        adapter, config=dataclasses.replace(adapter.config, recognizer="feedfacefeedface")
    )
    with pytest.raises(MismatchError, match=f"{identity.recognizer}.*feedfacefeedface"):
        trained.require_identity(identity, "person")
