"""What all programs have in common."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from idadapter_core.errors import ConfigError
from idadapter_core.program import Parser, run

CORE = Path(__file__).resolve().parents[2] / "idadapter_core"


def test_problems_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise ConfigError("train.lr must be above 0, got -1")

    def is_interrupted() -> int:
        raise KeyboardInterrupt

    assert run(lambda: 3) == 3
    assert (run(fails), run(fails, error=2)) == (1, 2)
    assert capsys.readouterr().err == "train.lr must be above 0, got -1\n" * 2
    assert run(is_interrupted, interrupted="all is kept") == 130
    assert capsys.readouterr().err == "\ninterrupted; all is kept\n"
    with pytest.raises(ZeroDivisionError):  # a defect of ours is no message
        run(lambda: 1 // 0)


def test_options_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--overwrite", action="store_true")
    with pytest.raises(SystemExit):
        parser.parse_args(["--over"])
    assert "unrecognized arguments: --over" in capsys.readouterr().err


def test_the_package_lists_its_programs() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "idadapter_core"], cwd=CORE.parent, capture_output=True, text=True, check=True
    ).stdout
    programs = {
        path.stem
        for path in CORE.glob("*.py")
        if path.stem != "__main__" and "\ndef main(" in path.read_text("utf-8")
    }
    programs |= {path.parent.name for path in CORE.glob("*/__main__.py")}
    assert {
        line.split()[2].partition(".")[2] for line in listed.splitlines() if line.startswith("python")
    } == programs
