"""Runs: exact when they go on, and whole when they are cut off."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from idadapter_core.config import config_toml
from idadapter_core.errors import CheckpointError, TrainingError
from idadapter_core.logs import read_log
from idadapter_core.training import checkpoints as checkpoint_files
from idadapter_core.training.checkpoints import ADAPTER, EMA, checkpoints, latest
from idadapter_core.training.config import TrainConfig
from idadapter_core.training.finite import advice_on_numbers
from idadapter_core.training.loop import STOPPED, train
from tests.core.training.processes import METHODS, ROOT, Process, largest_difference, wait_for, weights
from tests.harness.shim import shim_path
from tests.tiny.toy import Toy


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_went_on_equals_one_that_was_never_cut_off(toy: Toy, tmp_path: Path, method: str) -> None:
    settings = {
        **METHODS[method],
        "train": {"steps": 4, "global_batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.9},
    }
    assert train(toy.config(tmp_path / "whole", **settings)) == 0
    first = {**settings, "train": {**settings["train"], "steps": 2}}
    assert train(toy.config(tmp_path / "parts", **first)) == 0
    assert train(toy.config(tmp_path / "parts", **settings), resume="auto") == 0
    for name in (ADAPTER, EMA):
        assert (
            largest_difference(weights(tmp_path / "whole", 4, name), weights(tmp_path / "parts", 4, name))
            == 0
        )
    assert largest_difference(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 2)) > 0


def test_killed_and_resumed(toy: Toy, tmp_path: Path) -> None:
    """20 steps; and 20 steps with a kill -9 after the tenth. The same bits."""
    settings = {
        "train": {"steps": 20, "global_batch_size": 4, "learning_rate": 1e-3},
        "output": {"save_every": 10},
    }
    whole = Process(toy, tmp_path / "whole", **settings)
    assert whole.wait()[0] == 0
    cut = Process(toy, tmp_path / "cut", **settings)
    wait_for(lambda: latest(tmp_path / "cut") is not None, cut)
    cut.kill()
    assert [c.step for c in checkpoints(tmp_path / "cut")] == [10]
    code, output = Process(toy, tmp_path / "cut", "--resume", "auto", **settings).wait()
    assert code == 0, output
    assert largest_difference(weights(tmp_path / "whole", 20), weights(tmp_path / "cut", 20)) == 0
    assert [line["step"] for line in read_log(tmp_path / "cut")] == list(range(1, 21))


def test_two_processes_learn_what_one_does(toy: Toy, tmp_path: Path) -> None:
    """Up to rounding, which Adam makes as large as a share of the learning rate where a gradient is nearly 0."""
    settings = {"train": {"steps": 4, "global_batch_size": 4, "learning_rate": 1e-5}}
    alone = Process(toy, tmp_path / "alone", **settings)
    assert alone.wait()[0] == 0
    code, output = Process(toy, tmp_path / "two", processes=2, **settings).wait()
    assert code == 0, output
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert largest_difference(weights(tmp_path / "alone"), weights(tmp_path / "two")) < 1e-6
    logs = read_log(tmp_path / "alone"), read_log(tmp_path / "two")
    for number in ("loss", "gradient_norm"):
        assert [line[number] for line in logs[0]] == pytest.approx(
            [line[number] for line in logs[1]], rel=1e-4
        )


def test_micro_batches_learn_what_a_batch_does(toy: Toy, tmp_path: Path) -> None:
    for parts in (1, 2):
        train(
            toy.config(
                tmp_path / str(parts), train={"gradient_accumulation_steps": parts, "learning_rate": 1e-5}
            )
        )
    assert largest_difference(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-6


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c(toy: Toy, tmp_path: Path, presses: int) -> None:
    """Once: a checkpoint, and no traceback. Twice: at once."""
    run = tmp_path / "run"
    process = Process(toy, run, train={"steps": 100_000}, data={"workers": 1})
    wait_for(lambda: len(read_log(run)) >= 2, process)
    for _ in range(presses):
        process.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    code, output = process.wait()
    assert "Traceback" not in output
    # The second one may come when the step is over already.
    assert code in ((STOPPED,) if presses == 1 else (130, STOPPED)), output
    if code == STOPPED:
        assert latest(run).step == read_log(run)[-1]["step"]  # type: ignore[union-attr]
    else:
        assert "resume from the last checkpoint with --resume auto" in output


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_sigterm_writes_a_checkpoint_and_leaves(
    toy: Toy, tmp_path: Path, processes: int, workers: int
) -> None:
    """Sent to all of a run's processes, as a cluster does it, or to the launcher alone."""
    run = tmp_path / "run"
    process = Process(toy, run, processes=processes, train={"steps": 100_000}, data={"workers": workers})
    wait_for(lambda: len(read_log(run)) >= 2, process)
    for member in process.family()[: None if processes == 1 else 1]:
        member.terminate()
    code, output = process.wait()
    assert code == STOPPED if processes == 1 else code != 0, output  # the launcher has exit codes of its own
    found = latest(run)
    assert found is not None, output
    assert found.step == read_log(run)[-1]["step"]
    assert "the checkpoint is written" in output


def test_one_of_two_processes_fails(toy: Toy, tmp_path: Path) -> None:
    """A photo that only one of them cannot read: both leave, the steps before it are in a checkpoint, and the message is plain."""
    copy = Toy(tmp_path / "toy", toy.kind)
    shutil.copytree(toy.folder, copy.folder)
    photos = sorted((copy.folder / "photos").rglob("*.png"))
    photos[3].write_bytes(b"")
    run = tmp_path / "run"
    code, output = Process(
        copy, run, processes=2, train={"steps": 100_000, "global_batch_size": 2, "seed": 1}
    ).wait()
    assert code != 0
    assert f"{photos[3].parent.name}/{photos[3].name}" in output
    assert "another process failed" in output
    found = latest(run)
    done = len(read_log(run))
    assert (found.step if found else 0) == done > 0


def test_one_process_dies(toy: Toy, tmp_path: Path) -> None:
    """The other names it, and leaves a checkpoint of the steps done, from which the run goes on."""
    run = tmp_path / "run"
    settings = {"train": {"steps": 100_000}, "output": {"save_every": 2}}
    process = Process(toy, run, processes=2, **settings)
    wait_for(lambda: latest(run) is not None, process)
    process.family()[-1].kill()
    code, output = process.wait()
    assert code != 0
    assert re.search("step .*: process [01] of 2 is gone .*The checkpoint of step [0-9]+ is written", output)
    found = latest(run)
    assert found is not None
    assert found.step == read_log(run)[-1]["step"]
    settings["train"] = {"steps": found.step + 1}
    assert train(toy.config(run, **settings), resume="auto") == 0
    assert latest(run).step == found.step + 1  # type: ignore[union-attr]


def test_a_full_disk_keeps_the_last_checkpoint(toy: Toy, tmp_path: Path) -> None:
    """The system lets no file grow beyond what the adapter needs, so the write fails half-way."""
    train(toy.config(tmp_path, train={"steps": 2}))
    size = (checkpoints(tmp_path)[0].path / ADAPTER).stat().st_size
    with (
        no_file_longer_than(size + 4096),
        pytest.raises(CheckpointError, match="earlier checkpoints are untouched; free some space and resume"),
    ):
        train(toy.config(tmp_path, train={"steps": 3}), resume="auto")
    assert {p.name for p in (tmp_path / checkpoint_files.FOLDER).iterdir()} == {"step-00000002"}
    assert train(toy.config(tmp_path, train={"steps": 3}), resume="auto") == 0


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_from_the_start(
    toy: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A new run leaves no half of a file, and one that goes on leaves those that were there."""
    run = tmp_path / "run"
    with (
        no_file_longer_than(100),
        pytest.raises(CheckpointError, match=r"config.toml: cannot be written .* free some space"),
    ):
        train(toy.config(run))
    assert not [path for path in run.rglob("*") if path.is_file()]
    train(toy.config(run, train={"steps": 2}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for size in (100, 1200):  # config.toml has more than 1200 bytes
        with no_file_longer_than(size), pytest.raises(CheckpointError, match="cannot be written"):
            train(toy.config(run, train={"steps": 3}), resume="auto")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # TensorBoard writes in a thread of its own, whose errors Python prints as tracebacks.
    settings: dict[str, Any] = {"output": {"tensorboard": True, "save_every": 1}, "train": {"steps": 50}}
    with (
        no_file_longer_than(2600),
        pytest.raises((TrainingError, CheckpointError), match="cannot be written"),
    ):
        train(toy.config(tmp_path / "tensorboard", **settings))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (
            {},
            r"Lower train.learning_rate \(3e-05\), set train.max_grad_norm .*, or set train.lr_warmup_steps.",
        ),
        (
            {"mixed_precision": "bf16"},
            r"Lower train.learning_rate .* or set train.mixed_precision = \"no\", .* bf16 has 8.",
        ),
        (
            {"max_grad_norm": 2.0, "lr_warmup_steps": 9, "learning_rate": 1e-3},
            r"Lower train.learning_rate \(0.001\), or lower train.max_grad_norm \(2\).",
        ),
    ],
)
def test_advice_about_numbers_fits_the_run(settings: dict[str, Any], advice: str) -> None:
    given = advice_on_numbers(TrainConfig(**settings))
    assert re.fullmatch(advice, given)
    assert ("bf16" in given) == ("mixed_precision" in settings)


def test_killed_while_writing_a_checkpoint(toy: Toy, tmp_path: Path) -> None:
    """A process that ends between two files of a checkpoint leaves the one before."""
    train(toy.config(tmp_path / "run", train={"steps": 2}))
    code = (
        "import os, signal, sys, torch\n"
        "torch.save = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from idadapter_core.cli.train import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    config = tmp_path / "run.toml"
    config.write_text(config_toml(toy.config(tmp_path / "run", train={"steps": 3})), encoding="utf-8")
    path = os.pathsep.join(str(p) for p in (shim_path(), ROOT) if p)
    ended = subprocess.run(
        [sys.executable, "-c", code, "--config", str(config), "--resume", "auto"],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
        timeout=240,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [c.step for c in checkpoints(tmp_path / "run")] == [2]
    assert train(toy.config(tmp_path / "run", train={"steps": 3}), resume="auto") == 0
    assert [p.name for p in sorted((tmp_path / "run" / checkpoint_files.FOLDER).iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]
