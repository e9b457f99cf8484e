"""The command: exit codes, requirements, and that nothing runs where the request is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from idadapter_core.cli import evaluate as command
from idadapter_core.config import config_toml
from idadapter_core.data.index import write_index
from idadapter_core.evaluation import generate, observe
from tests.core.evaluation.world import Painter, configure, index_of


@pytest.fixture(scope="module")
def config(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of a run that draws the person and of one that draws a stranger, as a file."""
    folder = tmp_path_factory.mktemp("command")
    found = {"width": 128, "height": 128, "box": (0.0, 0.0, 1.0, 1.0), "landmarks": ((0.0, 0.0),) * 5}
    rows = [replace(row, **found) for row in index_of(world).rows]
    write_index(world / "index.parquet", world, rows, torch.zeros(len(rows), 512), {})
    small = configure(
        world,
        folder / "result",
        "same",
        "stranger",
        data={"identities": 2},
        metrics={"second": "", "clip": ""},
        expression={"path": ""},
    )
    for run in small.runs:  # they are painted, not read
        Path(run.path).touch()
    path = folder / "eval.toml"
    path.write_text(config_toml(small), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PipelineGenerator", Painter)


@pytest.mark.parametrize(
    ("required", "code", "said"),
    [
        ([], 0, ""),
        (["same/id_sim>=0.9", "stranger/id_sim<=0.4", "miss_rate<=0"], 0, ""),
        (["id_sim>=0.9"], 1, "required id_sim>=0.9: stranger, scale 1 has id_sim 0."),
        (
            ["same/id_sim>=0.9", "same/pose_hit<=0.5"],
            1,
            "required same/pose_hit<=0.5: same, scale 1 has pose_hit 1\n",
        ),
        (["verified>=0.1"], 1, "same, scale 1 has verified n/a"),
    ],
)
def test_requirements_set_the_exit_code(
    config: Path, required: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument for text in required for argument in ("--require", text)]
    assert command.main(["--config", str(config), *arguments]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("required") == (0 if code == 0 else max(1, shown.err.count("\n")))
    assert "same, scale 1: IDAdapter ID-Sim 0.9" in shown.out
    assert "report.html" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--require", "id_smi>=0.9"], "there is no metric id_smi"),
        (["--require", "clip_t>=0.2"], "needs metrics.clip"),
        (["--set", "metrics.second=gone"], "metrics.second: gone is not there (that is "),
        (["--set", "output.folder=/dev/null"], "output.folder: /dev/null is a file; name a folder"),
        (["--set", "sampling.step=3"], "unknown setting sampling.step; did you mean steps?"),
        (["--set", "runs.scales=[1]"], "change it in the file"),
        (["--preset", "uniid-ablation"], "preset.adapters.adapter is missing"),
        (["--set", "data.index="], "data.index is empty"),
    ],
)
def test_a_wrong_request_ends_before_anything_runs(
    config: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("models were opened")

    monkeypatch.setattr(observe, "Observer", never)
    monkeypatch.setattr(generate, "PipelineGenerator", never)
    assert command.main(["--config", str(config), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_setting_of_the_command_line(config: Path, tmp_path: Path) -> None:
    assert (
        command.main(
            ["--config", str(config), "--set", f"output.folder={tmp_path}", "--set", "data.identities=1"]
        )
        == 0
    )
    assert "identities = 1" in (tmp_path / "config.toml").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.toml",
        "per_image.csv",
        "pictures",
        "report.html",
        "seen",
        "summary.json",
        "summary.md",
    }
