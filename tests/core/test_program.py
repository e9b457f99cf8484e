"""What all programs have in common."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import zeros

from idadapter_core.cli import COMMANDS, main
from idadapter_core.cli.program import Parser, run
from idadapter_core.data.index import write_index
from idadapter_core.data.rows import Row
from idadapter_core.errors import ConfigError

CORE = Path(__file__).resolve().parents[2] / "idadapter_core"


def test_problems_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise ConfigError("train.learning_rate must be above 0, got -1")

    def is_interrupted() -> int:
        raise KeyboardInterrupt

    assert run(lambda: 3) == 3
    assert (run(fails), run(fails, error=2)) == (1, 2)
    assert capsys.readouterr().err == "train.learning_rate must be above 0, got -1\n" * 2
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


def test_the_package_lists_its_commands() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "idadapter_core"], cwd=CORE.parent, capture_output=True, text=True, check=True
    ).stdout
    modules = {
        path.stem for path in (CORE / "cli").glob("[!_]*.py") if "\ndef main(" in path.read_text("utf-8")
    }
    assert {command.module for command in COMMANDS.values()} == modules
    for name, command in COMMANDS.items():
        assert f"  {name} " in listed
        assert command.summary in listed


def test_an_unknown_command_is_refused_with_all_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian", "--config", "run.toml"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "trian" in said
    assert "train" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m idadapter_core {name}" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_ends_a_program_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    """What is half done is cleared away, and whoever waits is told."""
    cleared: list[int] = []

    def is_terminated() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:  # which a signal is none of
            return 0
        finally:
            cleared.append(1)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert run(is_terminated, interrupted="all is kept") == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; all is kept\n"
    assert cleared == [1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_output_has_a_place_for_every_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shell's language has ASCII alone."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def says() -> int:
        print("Зоя \udce9")
        raise ConfigError("é is not there")

    assert run(says) == 1
    monkeypatch.undo()
    assert streams["stdout"].buffer.getvalue() == b"\\u0417\\u043e\\u044f \\udce9\n"  # type: ignore[attr-defined]
    assert streams["stderr"].buffer.getvalue() == b"\\xe9 is not there\n"  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows names files in Unicode")
def test_a_shell_without_letters(tmp_path: Path) -> None:
    """LC_ALL=C, and Python told not to help itself: names on the command line, in files and of files are read all the same."""
    folder = tmp_path / "Зоя"
    folder.mkdir()
    index = folder / "índex.parquet"
    write_index(
        index,
        folder,
        [Row(number=0, source="é.png", caption="写真", identity="Зоя", status="corrupt", reason="é")],
        zeros(1, 512),
        {},
    )
    config = folder / "cönf.toml"
    config.write_text(f'[base]\npath = "{folder}/été"\n', encoding="utf-8")
    environ = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environ |= {"PYTHONPATH": os.pathsep.join([str(CORE.parent), environ.get("PYTHONPATH", "")])}
    for arguments, code, said in (
        (["dedupe", str(index), str(folder / "dédupe.parquet")], 0, "0 photos are duplicates"),
        (["train", "--config", str(config)], 1, f"base.path: {folder}/été is not there"),
        (["evaluate", "--config", str(folder / "nö.toml")], 2, "nö.toml: no such file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "idadapter_core", *arguments],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        output = (done.stdout + done.stderr).decode()
        assert done.returncode == code, output
        assert said in output
        assert "Traceback" not in output
    assert (folder / "dédupe.parquet").is_file()
