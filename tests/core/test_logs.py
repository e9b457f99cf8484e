"""The log of a run: lines that any JSON reader takes, a resume that drops what was lost, and words for people."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from idadapter_core import logs
from idadapter_core.logs import LOG, RunLog, read_log, remaining


def write(folder: Path, start: int, lines: dict[int, dict[str, Any]], *, tensorboard: bool = False) -> None:
    log = RunLog(folder, start, 10, tensorboard)
    for step, values in lines.items():
        log.write(step, values)
    log.close()


def test_lines_are_strict_json(tmp_path: Path) -> None:
    """NaN and infinity, which JSON has not, become null; small numbers stay what they are."""
    values = {
        "loss": 0.123456789012,
        "lr": 3.2e-11,
        "deciles": [float("nan"), 1.0, float("inf")],
        "identity": {"cosine": None, "share": 0.25},
    }
    write(tmp_path, 0, {1: values})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / LOG).read_text(encoding="utf-8").splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert found.pop("time") > 1e9
    assert found == {
        "step": 1,
        "loss": 0.12345679,
        "lr": 3.2e-11,
        "deciles": [None, 1.0, None],
        "identity": {"cosine": None, "share": 0.25},
    }


def test_a_run_that_goes_on_drops_the_lines_that_were_lost(tmp_path: Path) -> None:
    """Those after its checkpoint, and the last one, which a kill cut through. A new run begins anew."""
    write(tmp_path, 0, {step: {"loss": float(step)} for step in range(1, 6)})
    with (tmp_path / LOG).open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, 3, {4: {"loss": 40.0}})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    write(tmp_path, 0, {1: {"loss": 10.0}})
    assert [line["loss"] for line in read_log(tmp_path)] == [10.0]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
    assert read_log(tmp_path / "nowhere") == []


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    """By a path of names. What was written after the checkpoint, from which a run goes on, is hidden."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def line(value: float) -> dict[str, Any]:
        return {"loss": value, "by": [1.0, float("nan"), 3.0], "gates": {"7": [0.5, 0.25]}, "none": None}

    write(tmp_path, 0, {step: line(float(step)) for step in (1, 2, 3)}, tensorboard=True)
    write(tmp_path, 1, {2: line(20.0)}, tensorboard=True)
    found = accumulators.EventAccumulator(str(tmp_path / logs.TENSORBOARD))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "by/00", "by/02", "gates/7/00", "gates/7/01"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert [event.value for event in found.Scalars("gates/7/01")] == [0.25, 0.25]


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal  # type: ignore[method-assign]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_where_nobody_looks_on_there_is_a_line_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """Not a bar, which would fill the machine's log."""
    now = [100.0]
    screen = Screen(is_terminal)
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", screen)
    log = RunLog(tmp_path, 2, 1000, tensorboard=False)
    for step in range(3, 200):
        now[0] += 1.0
        log.advance()
        log.show(step, 0.5, 4.0, 3700.0)
    log.close()
    told = screen.getvalue()
    if is_terminal:
        assert "step 63" not in told
        assert "loss=0.5" in told
        return
    assert told.splitlines() == [
        f"step {step} of 1000: loss 0.5, 4 images/s, 1 h 01 min left" for step in (63, 124, 185)
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.6, "60 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert remaining(seconds) == words
