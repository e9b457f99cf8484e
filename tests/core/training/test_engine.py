"""Runs: plain about faults and about their progress."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from idadapter_core.config import config_toml
from idadapter_core.errors import CheckpointError, ConfigError, InputError, TrainingError
from idadapter_core.logs import read_log
from idadapter_core.mechanisms.gated import GatedAdapter
from idadapter_core.training import checkpoints as checkpoint_files, loop
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.checkpoints import OPTIMIZER, checkpoints
from idadapter_core.training.loop import train
from tests.core.training.processes import ROOT, largest_difference, weights
from tests.harness.shim import shim_path
from tests.tiny.toy import TEST_PERSON, Toy


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


def test_the_encoder_may_learn_at_a_rate_of_its_own(toy: Toy, tmp_path: Path) -> None:
    """And goes on with it after a resumption. AdamW's first steps are as large as the rate."""
    slow: dict[str, Any] = {"learning_rate": 1e-3, "encoder_learning_rate": 1e-6, "weight_decay": 0.0}
    for folder, steps in (("whole", [3]), ("halves", [1, 3])):
        for end in steps:
            train(toy.config(tmp_path / folder, train={**slow, "steps": end}), resume="auto")
    before, after = weights(tmp_path / "halves", 1), weights(tmp_path / "halves", 3)
    assert largest_difference(after, weights(tmp_path / "whole")) == 0
    moved = {name: float((after[name] - start).abs().max()) for name, start in before.items()}
    layers = {name for name in moved if name.startswith("layers.")}
    assert max(moved[name] for name in layers) > 1e-3
    assert 0 < max(moved[name] for name in moved.keys() - layers) < 1e-5


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
