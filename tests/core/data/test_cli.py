"""`python -m idadapter_core`: what it prints and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from idadapter_core.cli import data as cli
from idadapter_core.data.index import read_index
from idadapter_core.data.stats import describe
from tests.core.data.conftest import Scanned

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def scan(photos: Path, output: Path, package: Path, *more: object) -> int:
    return run("scan", photos, output, "--face-package", package, "--provider", "cpu", "--workers", 0, *more)


def test_from_photos_to_shards(scanned: Scanned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = scanned.photos / "person_00"
    assert scan(good, tmp_path / "i.parquet", scanned.package) == 0
    printed = capsys.readouterr().out
    assert printed.count("non-commercial research only") == 1
    assert "3 ok" in printed
    assert run("stats", tmp_path / "i.parquet", "--references", 5) == 0
    assert "with 5 references" in capsys.readouterr().out
    assert run("dedupe", tmp_path / "i.parquet", tmp_path / "d.parquet", "--merge", "--threshold", 0.7) == 0
    assert "0 photos are duplicates now" in capsys.readouterr().out
    assert read_index(tmp_path / "d.parquet").facts["dedupe"] == {"people": "merge", "threshold": 0.7}
    assert run("shards", tmp_path / "d.parquet", tmp_path / "s", "--photos", 2) == 0
    assert "wrote 3 photos" in capsys.readouterr().out
    assert len(read_index(tmp_path / "s" / "index.parquet").usable()) == 3


def test_too_many_bad_photos(scanned: Scanned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = scan(scanned.photos, tmp_path / "i.parquet", scanned.package)
    printed = capsys.readouterr()
    assert code == 3
    assert "35.7% of the photos cannot be used, more than --max-bad-share 5.0%" in printed.err
    assert "bad/tiny.png: 48x48 px" in printed.out
    assert len(read_index(tmp_path / "i.parquet").rows) == 14
    assert (
        scan(scanned.photos, tmp_path / "i.parquet", scanned.package, "--overwrite", "--max-bad-share", 0.4)
        == 0
    )


def _hear_ctrl_c() -> None:
    """Processes in the background and pytest-xdist's own ignore it, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups of that kind")
def test_ctrl_c_while_workers_start(scanned: Scanned, tmp_path: Path) -> None:
    """It goes to all processes at the terminal; one of them tells, in one line."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "idadapter_core",
        "scan",
        str(scanned.photos),
    ]
    command += ["--face-package", str(scanned.package), "--provider", "cpu", "--workers", "2"]
    for number in range(5):  # on a busy machine all photos may be looked at before the signal comes
        process = subprocess.Popen(
            [*command, str(tmp_path / f"{number}.parquet")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
        assert process.stdout is not None
        while "face models run on" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
        if process.returncode != 3:
            break
    assert process.returncode == 130
    assert said.strip() == "interrupted; give the same command again to go on"


def test_limits_are_options(scanned: Scanned, tmp_path: Path) -> None:
    photos = scanned.photos / "person_00"
    assert scan(photos, tmp_path / "i.parquet", scanned.package, "--min-side", 300, "--max-yaw", 1.5) == 3
    index = read_index(tmp_path / "i.parquet")
    assert index.counts()["too_small"] == 3
    assert index.facts["limits"]["max_yaw"] == 1.5


def test_a_scan_says_what_it_read_and_what_not(
    few: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (few / "person_00" / "0.txt").write_bytes("фото".encode("cp1251"))
    (few / "person_00" / "clip.MOV").touch()
    (few / "ids.txt").write_text("person_00/0.png anna\n")
    assert scan(few, tmp_path / "i.parquet", package) == 3
    printed = capsys.readouterr().out
    for line in (
        "files: 14, of these 6 photos, 6 texts, 0 tables, 2 not read",
        "  not read: 1 .mov (first person_00/clip.MOV): videos are not read",
        "  not read: 1 .txt (first ids.txt)",
        "captions for 5 of 6 photos; first without: person_00/0.png",
        "  person_00/0.png: its caption 0.txt cannot be read: byte 0xf4",
    ):
        assert line in printed, line
    identities = ("--identities", few / "ids.txt", "--encoding", "cp1251")
    assert scan(few, tmp_path / "j.parquet", package, *identities) == 0
    assert read_index(tmp_path / "j.parquet").rows[0].caption == "фото"
    assert "identities for 1 of 6 photos; first without: person_00/1.png" in capsys.readouterr().out
    for option in (("--min-match", 0.5), ("--min-match", 2)):
        assert scan(few, tmp_path / "k.parquet", package, *identities, *option) == 1
    errors = capsys.readouterr().err
    assert "At least 50.0% are asked for by --min-match" in errors
    assert "--min-match must be between 0 and 1, got 2.0" in errors


def test_errors_go_to_stderr_with_code_1(
    scanned: Scanned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "i.parquet"
    output.touch()
    for code, message in (
        (scan(tmp_path / "absent", tmp_path / "o.parquet", scanned.package), "no such folder"),
        (scan(scanned.photos, tmp_path / "o.parquet", tmp_path / "absent"), "does not exist"),
        (scan(scanned.photos, output, scanned.package), "add --overwrite"),
        (scan(scanned.photos, tmp_path / "o.csv", scanned.package), "must end in .parquet"),
        (scan(scanned.photos, tmp_path / "o.parquet", scanned.package, "--test-share", 2), "share of test"),
        (scan(scanned.photos, tmp_path / "o.parquet", scanned.package, "--workers", -1), "--workers"),
        (run("stats", output), "is empty"),
        (run("dedupe", output, tmp_path / "o.parquet"), "is empty"),
        (run("shards", tmp_path / "absent.parquet", tmp_path), "cannot be read"),
    ):
        assert code == 1, message
    errors = capsys.readouterr().err
    for message in (
        "no such folder",
        "does not exist",
        "add --overwrite",
        "must end in .parquet",
        "--workers",
    ):
        assert message in errors
    assert not (tmp_path / "o.parquet").exists()


def test_show_and_convert(scanned: Scanned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index of either kind is shown as JSON, one row a line: together with the facts, what one in JSON Lines holds."""
    index = scanned.index

    def shown(path: Path, *options: object) -> list[dict[str, Any]]:
        assert run("show", path, *options) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    rows = shown(index.path)
    assert [row["source"] for row in rows] == [row.source for row in index.rows]
    assert rows[-1]["landmarks"] == [list(point) for point in index.rows[-1].landmarks or ()]
    facts = shown(index.path, "--facts")
    assert facts == [dict(index.facts)]
    old = tmp_path / "old.jsonl"
    old.write_text(
        "".join(
            json.dumps(line) + "\n" for line in [{**facts[0], "version": 1, "root": str(index.root)}, *rows]
        )
    )
    for path in (index.path, old):
        assert shown(path, "--start", 2, "--count", 3) == rows[2:5]
        assert shown(path, "--status", "no_face") == [row for row in rows if row["status"] == "no_face"]
        assert shown(path, "--count", 0) == []
    assert run("stats", old) == 1
    assert f"convert-index {old} {tmp_path / 'old.parquet'}` once" in capsys.readouterr().err
    assert run("convert-index", old, tmp_path / "new.parquet") == 1
    assert "the embeddings of old.jsonl cannot be read" in capsys.readouterr().err
    name = f"{facts[0]['embeddings']}.safetensors"
    shutil.copy(index.path.with_name(f"{index.path.stem}.{name}"), tmp_path / f"old.{name}")
    assert run("convert-index", old, tmp_path / "new.parquet") == 0
    assert "14 photos, 9 ok" in capsys.readouterr().out
    assert shown(tmp_path / "new.parquet") == rows
    assert run("convert-index", old, tmp_path / "new.parquet") == run("show", old, "--start", -1) == 1
    errors = capsys.readouterr().err
    assert "add --overwrite" in errors
    assert "--start and --count must be at least 0" in errors


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes of that kind")
def test_who_reads_what_is_shown_may_stop(scanned: Scanned) -> None:
    command = f"{sys.executable} -m idadapter_core show {scanned.index.path} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (json.loads(done.stdout)["number"], done.stderr) == (0, "")


def test_a_rank_other_than_the_first(
    scanned: Scanned, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks at its photos, or says that nothing is left; rank 0 alone says what was found."""
    output = tmp_path / "i.parquet"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert scan(scanned.photos / "person_00", output, scanned.package) == 0
    assert capsys.readouterr().out == "rank 1 of 2: all its photos are scanned; rank 0 writes the index\n"
    monkeypatch.setenv("RANK", "0")
    assert scan(scanned.photos / "person_00", output, scanned.package) == 0
    assert "3 photos, 3 ok" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert run("shards", output, tmp_path / "s", "--photos", 2) == 0
    assert capsys.readouterr().out == "rank 1 of 2: all its shards are written; rank 0 writes the index\n"
    monkeypatch.setenv("RANK", "0")
    assert run("shards", output, tmp_path / "s", "--photos", 2) == 0
    assert "wrote 3 photos" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert scan(scanned.photos / "person_00", output, scanned.package) == 0
    assert "i.parquet exists already; nothing is left to do" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "2")
    assert scan(scanned.photos / "person_00", output, scanned.package) == 1


def test_as_a_program(scanned: Scanned, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "idadapter_core", "stats", str(scanned.index.path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == describe(scanned.index) + "\n"


def test_stats_in_words(scanned: Scanned) -> None:
    text = describe(scanned.index, references=4)
    for line in (
        "14 photos, 35.7% of them unusable",
        "  ok                   9   64.3%",
        "many_faces (1):\n  bad/two_faces.png: 2 faces, the second is 100% of the largest; below 50% is allowed",
        "people: 3 with 9 usable photos; 0 photos of nobody known",
        "  2 to 3               3  100.0%",
        "  256 to 511           9  100.0%",
        "captions: 9 of 9 usable photos have one",
        # Three photos of each person: two beside the one to learn.
        "with 4 references beside the photo to learn: 9 of 9 usable photos are of people with too few; "
        "18 references (50.0%) are made from others",
    ):
        assert line in text, line
    assert "0 of 9 usable photos are of people with too few" in describe(scanned.index, references=2)
