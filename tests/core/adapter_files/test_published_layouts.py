"""Adapter files of other layouts: each is read, and missing parts are named."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.adapter import Adapter, initial_adapter, load_adapter, save_adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.files import state_digest
from idadapter_core.identity import identical
from tests.core.adapter_files.writing import State, bare, behind, write
from tests.tiny.features import face_features
from tests.tiny.uniid import branch, write_published


def training_dump(state: State) -> State:
    unet = {
        f"unet.{module}.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 2)
        for module in ("down_blocks.1", "mid_block")
    }
    return {**unet, **state, "image_encoder.conv1.weight": torch.ones(2, 2, 3, 3)}


def averaged_dump(state: State) -> State:
    """The model beside a moving average of it, written after it."""
    return {**state, **behind({key: 0 * tensor for key, tensor in state.items()}, "ema.")}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "flat": lambda state: state,
    "ordered": OrderedDict,
    "module.": lambda state: behind(state, "module."),
    "unet.": lambda state: behind(state, "unet."),
    "training dump": training_dump,
    "training dump of a wrapped model": lambda state: behind(training_dump(state), "module."),
    "with an average": averaged_dump,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"step": torch.tensor(1.0)}},
    "nested branches": lambda state: {
        "text_branch": bare(branch(state, "text")),
        "adapter_branch": bare(branch(state, "adapter")),
    },
    "half": lambda state: {key: tensor.half() for key, tensor in state.items()},
}
NESTED = ("state_dict", "model", "nested branches")  # a safetensors file is flat


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [(layout, ".bin") for layout in LAYOUTS]
    + [(layout, ".safetensors") for layout in LAYOUTS if layout not in NESTED],
)
def test_every_layout_gives_the_same_adapter(
    adapter: Adapter, state: State, tmp_path: Path, layout: str, suffix: str
) -> None:
    content, path = LAYOUTS[layout](state), tmp_path / f"whatever{suffix}"
    write(path, content) if suffix == ".bin" else save_file(dict(content), path)
    loaded = load_adapter(path)
    assert loaded.config == adapter.config
    expected = adapter.digest
    if layout == "half":
        expected = state_digest({key: tensor.half() for key, tensor in state.items()})
    assert loaded.digest == expected


@pytest.mark.parametrize("layout", ["published", "bare", "module.", "bare module.", "legacy"])
@pytest.mark.parametrize(("config_json", "as_folder"), [(True, True), (False, False)])
def test_two_published_files(
    adapter: Adapter, state: State, tmp_path: Path, layout: str, config_json: bool, as_folder: bool
) -> None:
    paths = []
    for name in ("adapter", "text"):
        weights = branch(state, name)
        if "bare" in layout:
            weights = bare(weights)
        if "module." in layout:
            weights = behind(weights, "module.")
        folder = tmp_path / f"{name}_branch"
        folder.mkdir()
        file = write(folder / "pytorch_model.bin", weights, _use_new_zipfile_serialization=layout != "legacy")
        if config_json:
            (folder / "config.json").write_text(json.dumps({"adapter_hidden_dim": 768, "seed": 0}))
        paths.append(folder if as_folder else file)
    loaded = load_adapter(*paths)
    assert loaded.digest == adapter.digest
    assert loaded.name == "adapter_branch/pytorch_model.bin + text_branch/pytorch_model.bin"
    assert loaded.notes == ()
    assert identical(loaded.encode(face_features(1)), adapter.encode(face_features(1)))


def test_half_files_say_what_is_missing(state: State, tmp_path: Path) -> None:
    adapter_file, text_file = write_published(tmp_path, state)
    only_adapter, only_text = load_adapter(adapter_file), load_adapter(text_file)
    assert not only_adapter.config.has_text_branch
    assert not only_text.config.has_adapter_branch
    for half, words in ((only_adapter, "it has no text branch"), (only_text, "it has no adapter branch")):
        assert len(half.notes) == 1
        assert words in half.notes[0]
        assert half.notes[0] in half.info
        save_adapter(half, tmp_path / "half.safetensors")
        assert load_adapter(tmp_path / "half.safetensors").digest == half.digest


def test_info_tells_what_was_read(adapter: Adapter) -> None:
    assert "UniID, text and adapter branches, " in adapter.info
    assert "7 attention sites, text width 64" in adapter.info
    assert "25 adapter tokens" in adapter.info
    assert "3 text tokens for the text encoders l 64" in adapter.info
    assert "not recorded in the file" in adapter.info


def test_a_second_text_branch_is_refused(state: State, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.bin", state)
    _, text_file = write_published(tmp_path, state)
    with pytest.raises(
        InputError, match=r"whole\.bin already holds a text branch; set text_branch to 'none'"
    ):
        load_adapter(whole, text_file)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            "text",
            "adapter",
            "the two branches are exchanged: text.bin holds the text branch, adapter.bin the adapter branch. Exchange the two "
            "files: choose adapter.bin as adapter and text.bin as text_branch.",
        ),
        (
            "text",
            "text",
            "text.bin is chosen twice, as adapter and as text_branch; it already holds a text branch, but no adapter branch: choose the "
            "file of the adapter branch as adapter, or set text_branch to 'none'.",
        ),
        (
            "adapter",
            "adapter",
            "adapter.bin is chosen twice, as adapter and as text_branch; it holds no text branch: choose the file of the text branch as "
            "text_branch, or set that to 'none'.",
        ),
        (
            "whole",
            "whole",
            "whole.bin is chosen twice, as adapter and as text_branch; it already holds a text branch: set text_branch to 'none'.",
        ),
        (
            "adapter",
            "other_adapter",
            "other_adapter.bin holds no text branch, only the adapter branch, as adapter.bin does. Choose the file of the text "
            "branch as text_branch, or 'none'.",
        ),
        (
            "text",
            "other_text",
            "text.bin and other_text.bin both hold the text branch. Choose the file of the adapter branch as adapter, or set "
            "text_branch to 'none'.",
        ),
        (
            "text",
            "whole",
            "whole.bin holds both branches, text.bin the text branch alone. Choose whole.bin as adapter and set text_branch to "
            "'none'.",
        ),
    ],
)
def test_wrong_pairs_of_files_are_told_what_to_do(
    state: State, tmp_path: Path, first: str, second: str, expected: str
) -> None:
    halves = {"text": branch(state, "text"), "adapter": branch(state, "adapter"), "whole": state}
    paths = [write(tmp_path / f"{name}.bin", halves[name.removeprefix("other_")]) for name in (first, second)]
    with pytest.raises(InputError) as refused:
        load_adapter(*paths)
    assert str(refused.value) == expected


def test_branches_for_recognisers_of_two_sizes_are_refused(state: State, tmp_path: Path) -> None:
    whole = load_adapter(write(tmp_path / "whole.bin", state)).config
    widths = {"adapter": (16, 32, 64, 96), "text": whole.stage_widths}
    configs = {
        "adapter": dataclasses.replace(whole, text_widths=(), stage_widths=widths["adapter"]),
        "text": dataclasses.replace(whole, adapter_tokens=0),
    }
    paths = [tmp_path / f"{name}.safetensors" for name in configs]
    for path, config in zip(paths, configs.values(), strict=True):
        save_adapter(initial_adapter(config, path.name), path)
    with pytest.raises(MismatchError, match=r"stages of their face recognisers are \(16.*and \(64"):
        load_adapter(*paths)


def test_branches_of_two_recognisers_are_refused(state: State, tmp_path: Path) -> None:
    paths = []
    for file, recognizer in zip(write_published(tmp_path, state), ("a" * 16, "b" * 16), strict=True):
        half = load_adapter(file)
        path = tmp_path / f"{recognizer[0]}.safetensors"
        save_adapter(
            dataclasses.replace(half, config=dataclasses.replace(half.config, recognizer=recognizer)), path
        )
        paths.append(path)
    with pytest.raises(MismatchError, match=f"{'a' * 16}, {'b' * 16}"):
        load_adapter(*paths)
    unknown, _ = write_published(tmp_path, state)
    assert load_adapter(unknown, paths[1]).config.recognizer == "b" * 16
