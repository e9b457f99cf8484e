"""Adapter and identity files: every layout is read, everything else is refused with a reason, nothing is lost on writing."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import stat
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from idadapter_core.adapter import Adapter, load_adapter, save_adapter
from idadapter_core.errors import CheckpointError, InputError, MismatchError
from idadapter_core.files import state_digest
from idadapter_core.identity import identical, load_identity, save_identity
from idadapter_core.methods.uniid import UniIDConfig
from idadapter_core.sites import Site, attention_sites
from idadapter_core.types import Identity
from tests.golden import recipe
from tests.tiny.features import face_features
from tests.tiny.uniid import TINY_SD15, TINY_SDXL, branch, tiny_adapter, uniid_state, write_published

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return uniid_state(TINY_SD15)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(TINY_SD15, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def identity(adapter: Adapter) -> Identity:
    return adapter.encode(face_features(1))


def write(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def read_own(path: Path) -> tuple[State, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- own format ------------------------------------------------------------------------------------------------------


def test_own_format_keeps_every_weight(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path / "own.safetensors")
    again = load_adapter(tmp_path / "own.safetensors")
    assert again.digest == adapter.digest
    assert again.config == adapter.config
    assert again.method == "uniid"
    before, after = adapter.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_perturbed_weight_survives_and_changes_the_digest(state: State, tmp_path: Path) -> None:
    digests = {state_digest(state)}
    for number, key in enumerate(list(state)[::7]):
        perturbed = {**state, key: state[key] + 1 / 3}
        adapter = load_adapter(write(tmp_path / "perturbed.bin", perturbed))
        save_adapter(adapter, tmp_path / "own.safetensors")
        again = load_adapter(tmp_path / "own.safetensors")
        assert torch.equal(again.state_dict()[key], perturbed[key]), key
        digests.add(again.digest)
        assert len(digests) == number + 2
    save_adapter(load_adapter(write(tmp_path / "x.bin", state)), tmp_path / "own.safetensors")
    assert load_adapter(tmp_path / "own.safetensors").digest in digests


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(adapter: Adapter, tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(adapter, tmp_path / "half.safetensors", dtype)
    stored, _ = read_own(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    half = load_adapter(tmp_path / "half.safetensors")
    assert half.digest != adapter.digest
    assert str(dtype).removeprefix("torch.") in half.info
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in half.layers.parameters()} == {dtype}
    save_adapter(half, tmp_path / "again.safetensors")
    assert load_adapter(tmp_path / "again.safetensors").digest == half.digest
    one, other = (a.encode(face_features(1)).adapter_tokens for a in (adapter, half))
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, atol=0.2, rtol=0)


def test_the_config_travels_inside_the_file(adapter: Adapter, tmp_path: Path) -> None:
    config = dataclasses.replace(adapter.config, recognizer="feedfacefeedface")
    save_adapter(dataclasses.replace(adapter, config=config), tmp_path / "own.safetensors")
    again = load_adapter(tmp_path / "own.safetensors")
    assert again.config == config
    assert "feedfacefeedface" in again.info


def own_file(adapter: Adapter, path: Path, **changes: str | None) -> Path:
    """A file of our own with changed metadata; None removes an entry."""
    save_adapter(adapter, path)
    tensors, metadata = read_own(path)
    save_file(tensors, path, {k: v for k, v in {**metadata, **changes}.items() if v is not None})
    return path


@pytest.mark.parametrize("version", ["2", "99", "x", "1.5", None])
def test_newer_format_versions_are_refused(adapter: Adapter, tmp_path: Path, version: str | None) -> None:
    path = own_file(adapter, tmp_path / "own.safetensors", format_version=version)
    with pytest.raises(
        CheckpointError, match=rf"own\.safetensors: written in format version {version or '.none.'}.* update"
    ):
        load_adapter(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "faceid"}, "method 'faceid' is unknown to this release"),
        ({"method": None}, "method None is unknown"),
        ({"kind": None}, "its kind is (none)"),
        ({"kind": "lora"}, "its kind is lora"),
        ({"config": None}, "config cannot be read"),
        ({"config": "{"}, "config cannot be read"),
        ({"config": "[]"}, "config cannot be read"),
        ({"config": "null"}, "config cannot be read"),
    ],
)
def test_damaged_metadata(adapter: Adapter, tmp_path: Path, changes: dict[str, str], text: str) -> None:
    path = own_file(adapter, tmp_path / "own.safetensors", **changes)
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_adapter(path)
    assert str(caught.value).startswith("own.safetensors: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_width", 0),
        ("head_width", -64),
        ("head_width", None),
        ("adapter_width", "64"),
        ("adapter_width", 64.0),
        ("adapter_width", 100),
        ("adapter_width", 128),
        ("adapter_tokens", 0),
        ("adapter_depth", -1),
        ("text_widths", [64, 64, 64]),
        ("text_widths", None),
        ("site_widths", 3),
        ("site_widths", [[1]]),
        ("site_widths", ["a"]),
        ("recognizer", 5),
        ("future", 1),
    ],
)
def test_config_that_does_not_describe_the_weights(
    adapter: Adapter, tmp_path: Path, name: str, value: object
) -> None:
    config = json.dumps({**dataclasses.asdict(adapter.config), name: value})
    with pytest.raises(CheckpointError, match=r"^own\.safetensors: "):
        load_adapter(own_file(adapter, tmp_path / "own.safetensors", config=config))


# --- published and training layouts ----------------------------------------------------------------------------------


def behind(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def bare(state: State) -> State:
    return {key.partition(".")[2]: tensor for key, tensor in state.items()}


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


# --- incomplete and unrelated files ----------------------------------------------------------------------------------

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


def unet(depths: dict[str, int], side: str = "input") -> tuple[Site, ...]:
    return attention_sites(
        f"{stem}.transformer_blocks.{depth}.attn2.to_k.weight"
        for stem, count in depths.items()
        for depth in range(count)
    )


SEVEN = unet(
    {
        "input_blocks.1.1": 1,
        "input_blocks.2.1": 1,
        "middle_block.1": 1,
        **{f"output_blocks.{i}.1": 1 for i in range(4)},
    }
)


def widths(sites: tuple[Site, ...], channels: tuple[int, ...], context: int) -> dict[str, tuple[int, int]]:
    return {site.comfy_module: (width, context) for site, width in zip(sites, channels, strict=True)}


def test_an_adapter_fits_its_unet(adapter: Adapter) -> None:
    adapter.require_sites(SEVEN, widths(SEVEN, TINY_SD15.site_widths, 64), "SD15")


def test_another_family_is_refused_with_both_names(adapter: Adapter, tmp_path: Path) -> None:
    sdxl = unet({"input_blocks.1.1": 70})
    for_sd15 = dataclasses.replace(
        adapter, name="face.bin", config=UniIDConfig(site_widths=(320,) * 16, context_width=768)
    )
    with pytest.raises(MismatchError) as caught:
        for_sd15.require_sites(sdxl, widths(sdxl, (640,) * 70, 2048), "SDXL")
    assert str(caught.value) == (
        "face.bin was made for SD1.5, this checkpoint is SDXL. Load a checkpoint of the adapter's family, or an adapter that was "
        "made for this one."
    )
    assert "The two differ" not in str(caught.value)


def test_the_same_family_of_other_widths_is_refused(adapter: Adapter) -> None:
    with pytest.raises(MismatchError, match="The two differ in the widths of their layers"):
        adapter.require_sites(SEVEN, widths(SEVEN, (64,) * 7, 64), "SD15")
    with pytest.raises(MismatchError, match=r"text width 64, this checkpoint is SD21: .*text width 128"):
        adapter.require_sites(SEVEN, widths(SEVEN, TINY_SD15.site_widths, 128), "SD21")


def test_an_adapter_without_adapter_branch_fits_any_unet(state: State, tmp_path: Path) -> None:
    _, text_file = write_published(tmp_path, state)
    load_adapter(text_file).require_sites(SEVEN, widths(SEVEN, (8,) * 7, 8), "SD15")


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
