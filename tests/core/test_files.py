"""Weights are ours once they are loaded: their files may be overwritten, cut short or deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from idadapter_core.adapter import load_adapter, save_adapter
from idadapter_core.errors import CheckpointError
from idadapter_core.faces.iresnet import IResNet, load_iresnet, save_iresnet
from idadapter_core.files import read_tensors
from idadapter_core.identity import load_identity, save_identity
from idadapter_core.stable_diffusion.vision import load_vision
from idadapter_core.types import Identity
from tests.tiny.features import face_features
from tests.tiny.idadapter import CONFIGS, tiny_idadapter
from tests.tiny.uniid import TINY_SD15, tiny_uniid, uniid_state
from tests.tiny.vision import WIDTH, config_file, vision_state

State = Mapping[str, Tensor]
Load = Callable[[Path], State]


def write_identity(path: Path) -> None:
    save_identity(tiny_uniid(TINY_SD15).encode(face_features(1)), path)


def identity_tensors(path: Path) -> State:
    identity: Identity = load_identity(path)
    assert identity.adapter_tokens is not None
    return {"tokens": identity.adapter_tokens, **identity.text_tokens}


def write_recognizer(path: Path) -> None:
    save_iresnet(IResNet((1, 1, 1, 1)), path, torch.float32)


def write_vision(path: Path) -> None:
    save_file(vision_state(), path)
    path.with_name("config.json").write_bytes(config_file(WIDTH).read_bytes())


FILES: dict[str, tuple[str, Callable[[Path], object], Load]] = {
    "IDAdapter": (
        "a.safetensors",
        lambda path: save_adapter(tiny_idadapter(CONFIGS["sd15"]), path),
        lambda path: load_adapter(path).state_dict(),
    ),
    "published UniID": (
        "a.bin",
        lambda path: torch.save(uniid_state(TINY_SD15), path),
        lambda path: load_adapter(path).state_dict(),
    ),
    "older pickle": (
        "a.bin",
        lambda path: torch.save(uniid_state(TINY_SD15), path, _use_new_zipfile_serialization=False),
        lambda path: load_adapter(path).state_dict(),
    ),
    "identity": ("p.safetensors", write_identity, identity_tensors),
    "recogniser": ("r.safetensors", write_recognizer, lambda path: load_iresnet(path).state_dict()),
    "CLIP vision": (
        "v.safetensors",
        write_vision,
        lambda path: load_vision(path, "cpu", torch.float32).model.state_dict(),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_was_loaded_does_not_change_with_its_file(kind: str, tmp_path: Path) -> None:
    name, write, load = FILES[kind]
    path = tmp_path / name
    write(path)
    loaded = load(path)
    before = {key: tensor.clone() for key, tensor in loaded.items()}
    content = path.read_bytes()
    with path.open("r+b") as file:  # in place, as `cp` over it does
        file.write(bytes(len(content)))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in before.items())
    # Only now: where weights are still windows into the file, reading them would end the tests.
    path.write_bytes(b"")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in before.items())


def test_tensors_of_every_type_and_shape_are_read_as_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(3, 5, generator=generator)
    tensors = {
        "fp32": numbers,
        "fp16": numbers.half(),
        "bf16": numbers.bfloat16(),
        "fp8": numbers.to(torch.float8_e4m3fn),
        "fp64": numbers.double(),
        "odd bytes": torch.arange(7, dtype=torch.uint8),
        "truth": torch.tensor([True, False, True]),
        "whole": torch.tensor([[-1, 2**40]]),
        "one": torch.tensor(0.5),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "who": "me"})
    for mapped in (False, True):
        found, metadata = read_tensors(path, mapped=mapped)
        assert metadata == {"format": "pt", "who": "me"}
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype
            assert found[key].shape == tensor.shape
            assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_a_file_that_another_replaces_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "other"
    save_file({"x": torch.ones(4)}, path)
    save_file({"x": torch.ones(2)}, other)
    opened = Path.open
    calls: list[Path] = []

    def replaced(file: Path, *args: str) -> object:
        calls.append(file)
        if len(calls) == 2:  # first it is asked what it is, then its layout is read, and now its content
            other.replace(path)
        return opened(file, *args)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", replaced)
    with pytest.raises(CheckpointError, match="another file took its place while it was read"):
        read_tensors(path)
