"""The record of shipped files: digests, and scores that are measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from idadapter_core.demo_world.build.scores import Evidence, Measure
from idadapter_core.demo_world.build.settings import Group, Settings
from idadapter_core.demo_world.build.verify import changed_scores
from idadapter_core.demo_world.digests import changed_files, read_record, write_record
from idadapter_core.errors import CheckpointError

SMALL = Settings(
    "small",
    32,
    {
        "training": Group(5, 2, "training", 0),
        "shape": Group(4, 1, "test", 1, style="photo", accessory="none", one_look=True),
    },
)


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "first.bin").write_bytes(b"first")
    write_record(folder, "first", ["first.bin"], {"accuracy": 0.5})
    return folder


def test_shipped_files_are_recorded_and_found_again(assets: Path) -> None:
    assert changed_files(assets) == []
    assert read_record(assets)["first"]["scores"] == {"accuracy": 0.5}
    (assets / "first.bin").write_bytes(b"other")
    (problem,) = changed_files(assets)
    assert problem.startswith("first.bin (first) has the SHA-256 ")
    (assets / "first.bin").unlink()
    assert changed_files(assets) == ["first.bin (first) is missing; get this project again"]
    (assets / "record.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"record\.json cannot be read .*; get this project again"):
        changed_files(assets)


@pytest.mark.parametrize(
    ("found", "problems"),
    [
        ({"accuracy": 0.51}, []),
        ({"accuracy": 0.45}, ["first: accuracy is 0.45, the record says 0.5"]),
        ({}, ["first: accuracy is None, the record says 0.5"]),
    ],
)
def test_scores_are_measured_again(
    found: dict[str, float], problems: list[str], assets: Path, tmp_path: Path
) -> None:
    """On pictures that are drawn for it, of the groups that the measure needs."""
    lines: list[str] = []

    def scores(evidence: Evidence) -> dict[str, float]:
        assert evidence.files == assets
        assert len(evidence.pool("shape")) == 4
        return found

    measures = {"first": Measure(scores, ("shape",)), "other": Measure(scores, ("training",))}
    assert changed_scores(assets, tmp_path / "new", SMALL, 1, lines.append, measures) == problems
    assert lines == ["shape: 1 of 1 parts drawn", f"first: {json.dumps(found)}"]
    assert [path.name for path in (tmp_path / "new" / "pictures").iterdir()] == ["shape"]


def test_the_shipped_files_are_as_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    from idadapter_core.cli.demo_world import main

    assert main(["verify", "--digests-only"]) == 0
    assert capsys.readouterr().out == "the shipped files are as recorded\n"
    assert main(["verify", "--processes", "0"]) == 1
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err
