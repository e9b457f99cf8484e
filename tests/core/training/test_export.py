"""Export: from a run or a checkpoint to the file that Load ID Adapter reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from idadapter_core.adapter import load_adapter
from idadapter_core.cli.export import main
from idadapter_core.training.checkpoints import ADAPTER, EMA, checkpoints
from idadapter_core.training.loop import train
from tests.tiny.toy import Toy

UNIID = {"method": "uniid", "settings": {"adapter_depth": 1, "text_depth": 1}}
RUNS: dict[str, dict[str, Any]] = {
    "idadapter": {"adapter": {"settings": {"mixer_depth": 1}}, "train": {"ema_decay": 0.9}},
    "adapter": {"adapter": UNIID},
    "text": {"adapter": {**UNIID, "branch": "text"}, "train": {"ema_decay": 0.9}},
}


@pytest.fixture(scope="module")
def runs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps, each with a checkpoint; those with EMA hold averaged weights, too."""
    folder = tmp_path_factory.mktemp("runs")
    for name, sections in RUNS.items():
        config = toy.config(
            folder / name,
            adapter=sections["adapter"],
            loss={"identity": 0.0},
            train={"steps": 2, "global_batch_size": 2, "learning_rate": 1e-3, **sections.get("train", {})},
            output={"save_every": 1},
        )
        assert train(config) == 0
    return folder


def weights(run: Path, step: int, file: str = ADAPTER) -> dict[str, Tensor]:
    (found,) = [checkpoint.path for checkpoint in checkpoints(run) if checkpoint.step == step]
    return load_file(found / file)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def export(run: Path, output: Path, *arguments: Any) -> int:
    return main([str(run), str(output), *map(str, arguments)])


@pytest.mark.parametrize(
    ("name", "arguments", "step", "file"),
    [
        ("idadapter", (), 2, EMA),
        ("idadapter", ("--weights", "trained"), 2, ADAPTER),
        ("idadapter", ("--step", 1), 1, EMA),
        ("idadapter", ("--step", 1, "--weights", "trained"), 1, ADAPTER),
        ("adapter", (), 2, ADAPTER),
        ("text", ("--weights", "ema"), 2, EMA),
    ],
)
def test_the_file_holds_the_trained_weights(
    runs: Path, tmp_path: Path, name: str, arguments: tuple[Any, ...], step: int, file: str
) -> None:
    """And is what load_adapter reads, in the same precision."""
    output = tmp_path / "mine.safetensors"
    assert export(runs / name, output, *arguments) == 0
    expected = weights(runs / name, step, file)
    assert same(load_file(output), expected)
    adapter = load_adapter(output)
    assert same(dict(adapter.state_dict()), expected)
    assert adapter.method == ("idadapter" if name == "idadapter" else "uniid")
    others = [weights(runs / name, 3 - step, file), weights(runs / name, step, ADAPTER)]
    assert not same(expected, others[0])
    assert same(expected, others[1]) == (file == ADAPTER)


def test_a_checkpoint_is_exported_as_it_is(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoints(runs / "idadapter")[0].path
    output = tmp_path / "new" / "mine.safetensors"
    assert export(first, output, "--weights", "trained") == 0
    assert same(load_file(output), weights(runs / "idadapter", 1))
    told = capsys.readouterr().out
    assert "IDAdapter" in told
    assert str(first / ADAPTER) in told
    assert str(output) in told


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("keep", torch.float32)]
)
def test_precision(runs: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    output = tmp_path / "mine.safetensors"
    assert export(runs / "adapter", output, "--dtype", name) == 0
    expected = weights(runs / "adapter", 2)
    found = load_file(output)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert same(found, {key: tensor.to(dtype) for key, tensor in expected.items()})
    load_adapter(output)


@pytest.mark.parametrize("step", [None, 1])
def test_two_branches_become_one_file(runs: Path, tmp_path: Path, step: int | None) -> None:
    """The step is that of the first run; of the other one it is the newest."""
    output = tmp_path / "both.safetensors"
    chosen = () if step is None else ("--step", step)
    assert export(runs / "adapter", output, "--text-branch", runs / "text", *chosen) == 0
    both = weights(runs / "adapter", step or 2) | weights(runs / "text", 2, EMA)
    assert same(load_file(output), both)
    adapter = load_adapter(output)
    assert adapter.config.has_adapter_branch
    assert adapter.config.has_text_branch


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nowhere", (), r"nowhere: no such folder\. Name the folder of a run"),
        (".", (), r"no checkpoint \(there are: none\)"),
        ("idadapter", ("--step", 7), r"no checkpoint of step 7 \(there are: 1, 2\)"),
        ("adapter", ("--weights", "ema"), "no averaged weights.*--weights trained"),
        ("idadapter/checkpoints/step-00000001", ("--step", 2), "is one checkpoint; leave --step out"),
        ("idadapter", ("--text-branch", "text"), "an IDAdapter file, which holds everything"),
        ("adapter", ("--text-branch", "adapter"), "holds no text branch"),
        ("text", ("--text-branch", "text"), "already holds a text branch"),
    ],
)
def test_refusals(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: tuple[Any, ...],
    message: str,
) -> None:
    """With a message and exit code 1; nothing is written."""
    given = [runs / value if value in RUNS else value for value in arguments]
    assert export(runs / name, tmp_path / "mine.safetensors", *given) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mine.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(SystemExit) as raised:
        export(runs / "adapter", output)
    assert raised.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    assert export(runs / "adapter", output, "--overwrite") == 0
    assert same(load_file(output), weights(runs / "adapter", 2))
    with pytest.raises(SystemExit):
        export(runs / "adapter", tmp_path / "mine.pt")
    assert "must end in .safetensors" in capsys.readouterr().err
