"""The command that shows people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idadapter_core.cli.demo_world import main


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def test_a_sheet_has_a_row_per_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "sheet.png"
    arguments = [
        "grid",
        str(path),
        "--people",
        "2",
        "--pictures",
        "2",
        "--size",
        "32",
        "--seed",
        "3",
        "--captions",
    ]
    assert main(arguments) == 0
    written = capsys.readouterr().out.splitlines()
    assert len(written) == 5
    assert "(64 × 64 pixels)" in written[-1]
    first = sheet(path)
    assert first.shape == (64, 64, 3)
    assert main(arguments) == 0
    assert np.array_equal(sheet(path), first)


def test_a_sheet_of_all_styles(tmp_path: Path) -> None:
    path = tmp_path / "styles.png"
    assert (
        main(["grid", str(path), "--people", "1", "--pictures", "1", "--size", "32", "--style", "all"]) == 0
    )
    assert sheet(path).shape == (32, 5 * 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sheet.gif"], "must end in .png or .jpg, got sheet.gif"),
        (["sheet.png", "--people", "0"], "at least one person and one picture, got 0 and 8"),
        (["sheet.png", "--seed", "-1"], "seed must not be negative, got -1"),
        (["sheet.png", "--size", "8"], "within 32..1024 pixels, got 8"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["grid", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
