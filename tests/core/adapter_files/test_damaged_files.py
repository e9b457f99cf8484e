"""Adapter files that are incomplete, damaged or something else: refused with a reason, and no code in them is run."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from idadapter_core.adapter import Adapter, load_adapter, save_adapter
from idadapter_core.errors import CheckpointError
from idadapter_core.identity import load_identity, save_identity
from idadapter_core.types import Identity
from tests.core.adapter_files.writing import State, behind, write
from tests.golden import recipe

K3 = "adapter_branch.adapter_modules.3.to_k_ip.weight"
V3 = "adapter_branch.adapter_modules.3.to_v_ip.weight"
LATENTS = "adapter_branch.latents"
NORM = "text_branch.norm_1.weight"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({V3: None}, "1 missing (adapter_branch.adapter_modules.3.to_v_ip.weight)"),
        ({K3: None}, "adapter_modules must be numbered 1, 3, 5, … without a gap; missing [3]"),
        ({K3: None, V3: None}, "missing [3]"),
        ({LATENTS: None}, "adapter_branch.latents is missing"),
        ({NORM: None}, "text_branch.norm_1.weight is missing"),
        ({"text_branch.norm_1.bias": None}, "1 missing (text_branch.norm_1.bias)"),
        ({"text_branch.extra.weight": (3,)}, "1 unexpected (text_branch.extra.weight)"),
        (
            {V3: (64, 32)},
            "1 of another shape (adapter_branch.adapter_modules.3.to_v_ip.weight is (64, 32) instead of (64, 64))",
        ),
        (
            {"text_branch.norm_1.bias": (7,)},
            "1 of another shape (text_branch.norm_1.bias is (7,) instead of (64,))",
        ),
        ({LATENTS: (25, 64)}, "adapter_branch.latents has the shape (25, 64) instead of 3 dimensions"),
        ({NORM: ()}, "text_branch.norm_1.weight has the shape () instead of 1 dimensions"),
        ({NORM: (0,)}, "text_branch.norm_1.weight has the shape (0,)"),
        ({NORM: (100,)}, "width 100 must be divisible by head_width 64"),
        (
            {"text_branch.proj_1.proj.0.weight": (3,)},
            "proj.0.weight has the shape (3,) instead of 2 dimensions",
        ),
        ({K3: ()}, "to_k_ip.weight has the shape () instead of 2 dimensions"),
    ],
)
def test_incomplete_weights_are_named(
    state: State, tmp_path: Path, changes: dict[str, tuple[int, ...] | None], text: str
) -> None:
    changed = {key: tensor for key, tensor in state.items() if key not in changes}
    changed |= {key: torch.zeros(shape) for key, shape in changes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_adapter(write(tmp_path / "odd.bin", changed))
    assert str(caught.value).startswith("odd.bin: ")


def test_many_missing_keys_are_counted_and_three_are_named(state: State, tmp_path: Path) -> None:
    changed = {key: tensor for key, tensor in state.items() if ".to_v_ip." not in key}
    with pytest.raises(
        CheckpointError, match=r"7 missing \(adapter_branch\.adapter_modules\.1\.[^,]*, [^,]*, [^,]*, …\)"
    ):
        load_adapter(write(tmp_path / "odd.bin", changed))


def test_two_copies_without_a_plain_one_are_refused(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "two.bin", {**behind(state, "ema."), **behind(state, "model.")})
    with pytest.raises(CheckpointError, match=r"two\.bin: holds .* 2 times \(behind ema\., model\.\)"):
        load_adapter(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(adapter: Adapter, state: State, tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.bin")
    if kind == "safetensors":
        save_adapter(adapter, path)
    else:
        write(path, state, _use_new_zipfile_serialization=kind == "zip")
    size = int(share * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=rf"{path.name}: cannot be read \({size:,} bytes\).*download it again"
    ):
        load_adapter(path)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"hello world, these are no weights\n",
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
        b'{"adapter_hidden_dim": 768}',
        b"PK\x03\x04 no archive",
        bytes(range(256)) * 8,
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"cannot be read .*It is truncated or not a weights file"
    ) as caught:
        load_adapter(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_damage_ends_in_an_adapter_or_an_explanation(state: State, tmp_path: Path) -> None:
    small = dict(list(state.items())[:3])
    damage = recipe.draw(1, "damage", (200, 4))
    for kind in (True, False):
        whole = write(tmp_path / "whole.bin", small, _use_new_zipfile_serialization=kind).read_bytes()
        head = min(len(whole), 4000)  # where the structure is
        for row in damage:
            broken = bytearray(whole)
            for value in row:
                broken[int(abs(value) * 1e4) % head] = int(abs(value) * 1e6) % 256
            path = tmp_path / "broken.bin"
            path.write_bytes(bytes(broken))
            with pytest.raises(CheckpointError):  # three tensors are no adapter, damaged or not
                load_adapter(path)


class RunsCode:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_code_in_a_pickle_is_never_run(state: State, tmp_path: Path, kind: str, suffix: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"evil{suffix}"
    content = {**state, "more": RunsCode(trace)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({"more": RunsCode(trace)}, protocol=2))
    else:
        write(path, content, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError) as caught:
        load_adapter(path)
    assert not trace.exists()
    if suffix == ".bin":
        assert "loading this pickle would run code, which is never done here" in str(caught.value)
    # The file is what it claims to be: loaded without care, it leaves the trace.
    content_again = io.BytesIO(path.read_bytes())
    pickle.load(content_again) if kind == "plain pickle" else torch.load(content_again, weights_only=False)
    assert trace.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="would run code"):
        load_adapter(write(tmp_path / "module.bin", torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ([torch.ones(3)], "holds a list, not a state dict"),
        ({"epoch": 3}, "holds no weights"),
        ({}, "holds no weights"),
        ({"conv.weight": torch.ones(3)}, "holds no ID adapter (first keys: conv.weight)"),
        ({0: torch.ones(3)}, "holds no ID adapter (first keys: 0)"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, content: object, text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_adapter(write(tmp_path / "other.bin", content))


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.bin: no such file"):
        load_adapter(tmp_path / "absent.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"empty: the folder holds neither model\.safetensors nor pytorch_model"
    ):
        load_adapter(tmp_path / "empty")


def test_identity_and_adapter_files_are_told_apart(
    adapter: Adapter, identity: Identity, tmp_path: Path
) -> None:
    save_identity(identity, tmp_path / "person.safetensors")
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(
        CheckpointError, match=r"person\.safetensors: this file holds an identity, not an adapter"
    ):
        load_adapter(tmp_path / "person.safetensors")
    with pytest.raises(
        CheckpointError, match=r"adapter\.safetensors: this file holds an adapter, not an identity"
    ):
        load_identity(tmp_path / "adapter.safetensors")
