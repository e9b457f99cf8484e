"""Runs: exact when they go on, whole when they are cut off, and plain about what went wrong."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from idadapter_core.config import config_toml
from idadapter_core.errors import CheckpointError, ConfigError, InputError, TrainingError
from idadapter_core.logs import read_log
from idadapter_core.mechanisms.gated import GatedAdapter
from idadapter_core.training import checkpoints as checkpoint_files, loop
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.checkpoints import ADAPTER, EMA, OPTIMIZER, checkpoints, latest
from idadapter_core.training.config import TrainConfig
from idadapter_core.training.finite import advice_on_numbers
from idadapter_core.training.loop import STOPPED, train
from tests.harness.shim import shim_path
from tests.tiny.toy import TEST_PERSON, Toy

ROOT = Path(__file__).resolve().parents[3]
METHODS = {
    "idadapter": {},
    "uniid adapter": {"adapter": {"method": "uniid"}},
    "uniid text": {"adapter": {"method": "uniid", "branch": "text"}},
}


def weights(run: Path, step: int | None = None, name: str = ADAPTER) -> dict[str, torch.Tensor]:
    found = [c for c in checkpoints(run) if step in (None, c.step)]
    return load_file(found[-1].path / name)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


class Process:
    """A training in processes of its own."""

    def __init__(
        self,
        toy: Toy,
        folder: Path,
        *arguments: str,
        processes: int = 1,
        wrapper: Sequence[str] = (),
        **sections: dict[str, Any],
    ):
        self.config = folder.parent / f"{folder.name}.toml"
        self.config.write_text(config_toml(toy.config(folder, **sections)), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        program = ["-m", "idadapter_core", "train", "--config", str(self.config), *arguments]
        path = os.pathsep.join(str(p) for p in (shim_path(), ROOT) if p)
        self.log = (folder.parent / f"{folder.name}.log").open("wb+")
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, *(launcher if processes > 1 else []), *program],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> tuple[int, str]:
        try:
            code = self.process.wait(timeout=240)
        finally:
            self.kill()
        self.log.seek(0)
        return code, self.log.read().decode(errors="replace")

    def kill(self) -> None:
        """The process and all that it started, which the launcher puts into sessions of their own."""
        for process in reversed(self.family()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def wait_for(condition: Any, process: Process) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.process.poll() is None, process.wait()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
        assert "go on from the last checkpoint with --resume auto" in output


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


def test_a_loss_that_is_not_finite_names_the_photo(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(toy.config(tmp_path, train={"steps": 2}))
    forward = Bundle.forward
    named: list[str] = []

    def broken(self: Any, batch: Any) -> dict[str, torch.Tensor]:
        losses = forward(self, batch)
        named.append(batch.sources[2])
        losses["mse"][2] = float("nan")
        return {**losses, "loss": losses["loss"] * float("nan")}

    monkeypatch.setattr(Bundle, "forward", broken)
    with pytest.raises(TrainingError, match="step 3: the loss is not finite") as raised:
        train(toy.config(tmp_path, train={"steps": 4}), resume="auto")
    assert named[0] in str(raised.value)
    assert str(raised.value).count(".png") == 1
    assert "The last good checkpoint, of step 2, is kept: go on from it with --resume auto, and" in str(
        raised.value
    )
    assert [c.step for c in checkpoints(tmp_path)] == [2]
    named.clear()
    with pytest.raises(TrainingError, match=r"There is no checkpoint yet: start again\.$"):
        train(toy.config(tmp_path / "new", train={"steps": 4}))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_broke_after_the_scan(toy: Toy, tmp_path: Path, workers: int) -> None:
    """Nothing is lost: the steps before it are in a checkpoint, and with the photo back the run goes on."""
    copy = Toy(tmp_path / "toy", toy.kind)
    shutil.copytree(toy.folder, copy.folder)
    photos = sorted((copy.folder / "photos").rglob("*.png"))
    run = tmp_path / "run"
    settings: dict[str, Any] = {
        "data": {"workers": workers},
        "train": {"steps": 8},
        "output": {"save_every": 8},
    }
    broken = photos[3]
    content = broken.read_bytes()
    broken.write_bytes(content[:1000])
    with pytest.raises(
        InputError, match=f"{broken.parent.name}/{broken.name}.*changed since the scan"
    ) as raised:
        train(copy.config(run, **settings))
    assert "Traceback" not in str(raised.value)
    assert not multiprocessing.active_children()  # who would hold up the end of this process
    done = len(read_log(run))
    assert [c.step for c in checkpoints(run)] == ([done] if done else [])
    broken.write_bytes(content)
    assert train(copy.config(run, **settings), resume="auto") == 0


def test_a_test_photo_that_broke_loses_no_step(toy: Toy, tmp_path: Path) -> None:
    copy = Toy(tmp_path / "toy", toy.kind)
    shutil.copytree(toy.folder, copy.folder)
    run = tmp_path / "run"
    settings: dict[str, Any] = {"train": {"steps": 3}, "output": {"validate_every": 3, "validate_samples": 4}}
    assert train(copy.config(run, **{**settings, "train": {"steps": 1}})) == 0
    next((copy.folder / "photos" / TEST_PERSON).glob("*.png")).write_bytes(b"")
    with pytest.raises(InputError, match=TEST_PERSON):
        train(copy.config(run, **settings), resume="auto")
    assert [c.step for c in checkpoints(run)] == [1, 3]


def test_refusals(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(toy.config(tmp_path, train={"steps": 2}))
    with pytest.raises(ConfigError, match="holds a run already.*--resume auto"):
        train(toy.config(tmp_path))
    changes: dict[str, Any] = {"learning_rate": 1e-5, "weight_decay": 0.5, "steps": 3}
    with pytest.raises(
        ConfigError,
        match=r"settings changed.*train\.learning_rate was 0\.0001 and is 1e-05, .*--allow-config-change",
    ) as raised:
        train(toy.config(tmp_path, train=changes), resume="auto")
    assert "steps" not in str(raised.value)  # which may change
    assert train(toy.config(tmp_path, train=changes), resume="auto", allow_config_change=True) == 0
    (group,) = torch.load(checkpoints(tmp_path)[-1].path / OPTIMIZER, weights_only=True)["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.5)
    with pytest.raises(ConfigError, match="settings changed"):  # a cosine ends where the run does
        train(toy.config(tmp_path, train={**changes, "lr_scheduler": "cosine", "steps": 4}), resume="auto")
    with pytest.raises(ConfigError, match="train.global_batch_size is 4.*a multiple of 3"):
        train(toy.config(tmp_path / "other", train={"gradient_accumulation_steps": 3}))
    with pytest.raises(ConfigError, match="adapter.start: gone.safetensors is not there"):
        train(toy.config(tmp_path / "other", adapter={"start": "gone.safetensors"}))
    for section, name in (("base", "vision"), ("base", "tokenizer"), ("data", "cache")):
        lost = toy.config(tmp_path / "other", **{section: {name: "gone"}})
        with monkeypatch.context() as patched:
            patched.setattr(loop, "load_parts", None)  # nothing is loaded before
            with pytest.raises(ConfigError, match=f"{section}.{name}: gone is not there"):
                train(lost)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output.folder: .*is a file; name a folder"):
        train(toy.config(tmp_path / "file"))


def test_a_checkpoint_of_before_settings_were_renamed_goes_on(toy: Toy, tmp_path: Path) -> None:
    """Its digest and its configuration have the old names; a setting that changed is still refused."""
    train(toy.config(tmp_path, train={"steps": 1}))
    (checkpoint,) = checkpoints(tmp_path)
    state = json.loads((checkpoint.path / checkpoint_files.STATE).read_text("utf-8"))
    old = (checkpoint.path / "config.toml").read_text("utf-8")
    for name, before in {
        "learning_rate": "lr",
        "lr_scheduler": "schedule",
        "prediction_type": "prediction",
    }.items():
        assert f"\n{name} = " in old
        old = old.replace(f"\n{name} = ", f"\n{before} = ")
    (checkpoint.path / "config.toml").write_text(old, "utf-8")
    (checkpoint.path / checkpoint_files.STATE).write_text(json.dumps({**state, "config": "of then"}), "utf-8")
    with pytest.raises(
        ConfigError, match=r"settings changed.*train\.learning_rate was 0\.0001 and is 0\.1\."
    ):
        train(toy.config(tmp_path, train={"steps": 2, "learning_rate": 0.1}), resume="auto")
    assert train(toy.config(tmp_path, train={"steps": 2}), resume="auto") == 0


@pytest.mark.parametrize("what", ["prediction", "tokenizer", "detector"])
def test_other_models_at_the_same_paths_are_another_run(toy: Toy, tmp_path: Path, what: str) -> None:
    """Paths may change in a run that goes on, so what they lead to must not."""
    copy = Toy(tmp_path / "toy", toy.kind)
    shutil.copytree(toy.folder, copy.folder)
    settings: dict[str, Any] = {"loss": {"gate": "detector"}} if what == "detector" else {}
    run = tmp_path / "run"
    train(copy.config(run, train={"steps": 1}, **settings))
    if what == "prediction":
        scheduler = copy.folder / "base" / "scheduler" / "scheduler_config.json"
        content = json.loads(scheduler.read_text("utf-8"))
        turned = {"epsilon": "v_prediction", "v_prediction": "epsilon"}
        scheduler.write_text(json.dumps({**content, "prediction_type": turned[content["prediction_type"]]}))
    elif what == "tokenizer":
        vocabulary = copy.folder / "base" / "tokenizer" / "vocab.json"
        words = json.loads(vocabulary.read_text("utf-8"))
        words["a</w>"], words["of</w>"] = words["of</w>"], words["a</w>"]
        vocabulary.write_text(json.dumps(words), encoding="utf-8")
    else:
        detector = Path(copy.config(run).base.face_package) / "det_10g.onnx"
        detector.write_bytes(detector.read_bytes() + b"\x10\x08")  # its version, once more
    with pytest.raises(
        ConfigError, match=f"{'the face detector' if what == 'detector' else 'the base model'} changed"
    ):
        train(copy.config(run, train={"steps": 2}, **settings), resume="auto")


def test_weights_that_are_not_finite_take_no_place(toy: Toy, tmp_path: Path) -> None:
    """An update may overflow where loss and gradient did not."""
    train(toy.config(tmp_path, train={"steps": 2}))
    settings: dict[str, Any] = {"train": {"steps": 3, "learning_rate": 1e39}, "output": {"keep_last": 1}}
    with pytest.raises(TrainingError, match="step 3: .* weights are not finite.*of step 2, is kept"):
        train(toy.config(tmp_path, **settings), resume="auto", allow_config_change=True)
    assert [c.step for c in checkpoints(tmp_path)] == [2]


def test_accelerate_launches_it(toy: Toy, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(config_toml(toy.config(tmp_path / "run", train={"steps": 1})), encoding="utf-8")
    path = os.pathsep.join(str(p) for p in (shim_path(), ROOT) if p)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "idadapter_core", "train", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert [c.step for c in checkpoints(tmp_path / "run")] == [1]


def test_a_run_that_is_done_says_so(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy.config(tmp_path, train={"steps": 1}))
    assert train(toy.config(tmp_path, train={"steps": 1}), resume="auto") == 0
    assert "all 1 steps are done; raise train.steps" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(toy: Toy, tmp_path: Path) -> None:
    train(toy.config(tmp_path, train={"steps": 1}))
    (checkpoints(tmp_path)[0].path / OPTIMIZER).write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="step-00000001.*the optimiser's state cannot be read"):
        train(toy.config(tmp_path, train={"steps": 2}), resume="auto")


def test_more_steps_and_other_outputs_are_the_same_run(toy: Toy, tmp_path: Path) -> None:
    """And the same data and models in another folder."""
    train(toy.config(tmp_path, train={"steps": 1}))
    moved = Toy(tmp_path / "moved", toy.kind)
    shutil.copytree(toy.folder, moved.folder)
    settings = {"train": {"steps": 2}, "data": {"workers": 1}, "output": {"log_every": 2}}
    assert train(moved.config(tmp_path, **settings), resume="auto") == 0


def test_what_a_run_tells(toy: Toy, tmp_path: Path) -> None:
    """The log, validation, the picture grid, and facts by which it can be repeated."""
    run = tmp_path / "run"
    output = {
        "validate_every": 2,
        "validate_samples": 6,
        "sample_every": 4,
        "sample_steps": 2,
        "sample_people": 1,
        "tensorboard": True,
        "prompts": ["a photo of a <class word>"],
    }
    train(toy.config(run, output=output, train={"learning_rate": 1e-2, "global_batch_size": 8}))
    lines = read_log(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation" in line] == [0, 2, 4]
    last = steps[-1]
    assert len(last["loss_by_decile"]) == 10
    assert 0 <= last["data_wait_share"] <= 1
    assert last["images_per_second"] > 0
    assert 0 < last["identity"]["share"] <= 1
    assert -1 <= last["identity"]["cosine"] <= 1
    assert any(abs(value) > 1e-3 for pair in last["gates"].values() for value in pair)
    assert last["norm_ratios"].keys() == last["gates"].keys()
    assert all(ratio > 0 for ratio in last["norm_ratios"].values())
    assert last["loss"] > last["denoising"] > 0
    assert steps[0]["gradient_norm"] > 0
    assert list((run / "tensorboard").iterdir())
    assert (run / "samples" / "step-00000004.png").is_file()
    facts = json.loads((run / "run.json").read_text())
    assert {"torch", "accelerate", "diffusers"} <= facts["versions"].keys()
    assert facts["data"]["test"] == 4


def test_bf16_and_gradient_checkpointing(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters stay fp32, and what is recomputed is what was computed."""
    calls: list[int] = []
    project = GatedAdapter.project
    monkeypatch.setattr(GatedAdapter, "project", lambda *args: calls.append(1) or project(*args))
    counts = {}
    for name, settings in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"mixed_precision": "bf16"},
    }.items():
        calls.clear()
        train(toy.config(tmp_path / name, train=settings))
        counts[name] = len(calls)
    assert counts["checkpointing"] == 2 * counts["plain"]
    plain = weights(tmp_path / "plain")
    assert largest_difference(plain, weights(tmp_path / "checkpointing")) < 1e-6
    narrow = weights(tmp_path / "bf16")
    assert all(tensor.dtype == torch.float32 for tensor in narrow.values())
    assert 0 < largest_difference(plain, narrow) < 1e-3
    losses = [read_log(tmp_path / name)[0]["loss"] for name in ("plain", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("loss", [{"gate": "detector", "align": "detector"}, {"snr_gamma": 5.0}])
def test_sdxl_with_the_papers_gate_and_with_min_snr(
    toy_sdxl: Toy, tmp_path: Path, loss: dict[str, Any]
) -> None:
    assert train(toy_sdxl.config(tmp_path, loss=loss, train={"steps": 2, "global_batch_size": 2})) == 0
    assert all(0 < line["loss"] < 10 for line in read_log(tmp_path))
