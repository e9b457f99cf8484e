"""The index is read strictly and written whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from idadapter_core.data.index import Index, Row, read_index, write_index
from idadapter_core.errors import ConfigError, InputError
from tests.core.data.conftest import Scanned

ROW = Row(
    number=0,
    source="a/ä\udc80.png",
    sha256="0" * 64,
    width=10,
    height=20,
    box=(1.5, 2.0, 3.0, 4.0),
    landmarks=((1.0, 2.0),) * 5,
    split="train",
)
BAD = Row(number=1, source="b.png", status="blur", reason="blurred")


def written(folder: Path, *rows: Row, name: str = "index.jsonl") -> Index:
    embeddings = torch.arange(len(rows) * 512, dtype=torch.float32).reshape(-1, 512)
    return write_index(folder / name, folder / "photos", rows, embeddings, {"recognizer": "r", "rows": 99})


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    made = written(tmp_path, ROW, BAD)
    read = read_index(made.path)
    assert read.rows == made.rows == (ROW, BAD)
    assert (read.digest, read.root, dict(read.facts)) == (made.digest, made.root, dict(made.facts))
    assert read.root == tmp_path / "photos"
    assert read.facts["recognizer"] == "r"
    torch.testing.assert_close(read.embeddings(), torch.arange(1024.0).reshape(2, 512), rtol=0, atol=0)
    assert len(read.digest) == 16


def test_counting(tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, number=1, split="test"),
        replace(BAD, number=2),
        replace(BAD, number=3, status="duplicate"),
    ]
    index = written(tmp_path, *rows)
    assert [row.number for row in index.usable()] == [0, 1]
    assert [row.number for row in index.usable("test")] == [1]
    assert sum(index.counts().values()) == 4
    assert {status: count for status, count in index.counts().items() if count} == {
        "ok": 2,
        "blur": 1,
        "duplicate": 1,
    }
    assert index.bad_share() == 0.25


def test_index_and_photos_can_be_moved_together(scanned: Scanned, tmp_path: Path) -> None:
    moved = shutil.copytree(scanned.index.path.parent, tmp_path / "elsewhere")
    index = read_index(moved / "index.jsonl")
    assert index.root == moved / "photos"
    row = index.usable()[0]
    np.testing.assert_array_equal(index.load(row), scanned.index.load(row))


def test_photos_elsewhere_are_found_by_their_whole_path(scanned: Scanned, tmp_path: Path) -> None:
    old = scanned.index
    index = write_index(tmp_path / "a.jsonl", old.root, old.rows, old.embeddings(), old.facts)
    assert json.loads(index.path.read_bytes().splitlines()[0])["root"] == scanned.photos.as_posix()
    assert read_index(index.path).load(index.usable()[0]).shape == (256, 256, 3)


def test_loading_a_photo(scanned: Scanned) -> None:
    row = scanned.index.usable()[3]
    expected = np.asarray(Image.open(scanned.photos / row.source))
    np.testing.assert_array_equal(scanned.index.load(row), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"!"), "has changed since the scan"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_photo_that_is_not_the_one_scanned(
    change: Callable[[Path], None], message: str, scanned: Scanned, tmp_path: Path
) -> None:
    moved = shutil.copytree(scanned.index.path.parent, tmp_path / "elsewhere")
    index = read_index(moved / "index.jsonl")
    row = index.usable()[0]
    change(index.root / row.source)
    with pytest.raises(InputError, match=f"{row.source}.*{message}"):
        index.load(row)


SPOILED: list[tuple[str, Callable[[list[dict]], object], str]] = [
    ("row missing", lambda lines: lines.pop(), "1 rows, but its first line says 2"),
    ("row twice", lambda lines: lines.append(lines[-1]), "line 4: number must be 2, got 1"),
    ("other version", lambda lines: lines[0].update(version=2), "version 2.*reads version 1"),
    ("no facts", lambda lines: lines.pop(0), "its first line is not that of an index"),
    ("field missing", lambda lines: lines[1].pop("sha256"), "line 2 lacks sha256"),
    ("field unknown", lambda lines: lines[1].update(colour="red"), "line 2 has unknown colour"),
    (
        "unknown status",
        lambda lines: lines[2].update(status="fine"),
        "line 3: status must be one of ok, no_face",
    ),
    ("unknown split", lambda lines: lines[1].update(split="val"), "split must be train, test or empty"),
    ("wrong type", lambda lines: lines[1].update(width="10"), "width must be a whole number, got '10'"),
    ("true for a number", lambda lines: lines[1].update(width=True), "width must be a whole number"),
    ("not finite", lambda lines: lines[1].update(yaw=float("nan")), "yaw must be a number, got nan"),
    ("short box", lambda lines: lines[1].update(box=[1, 2, 3]), "box must be four numbers or null"),
    ("ok without a face", lambda lines: lines[1].update(box=None), "a row that is ok needs box"),
    ("ok with a reason", lambda lines: lines[1].update(reason="x"), "a row that is ok has no reason"),
    ("bad without a reason", lambda lines: lines[2].update(reason=""), "a row that is blur needs a reason"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in SPOILED], ids=[case[0] for case in SPOILED]
)
def test_an_index_that_makes_no_sense(
    change: Callable[[list[dict]], object], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, ROW, BAD).path
    lines = [json.loads(line.decode("utf-8", "surrogatepass")) for line in path.read_bytes().splitlines()]
    change(lines)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(ConfigError, match=message):
        read_index(path)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"no index\n"])
def test_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"index\.jsonl.*[Ss]can"):
        read_index(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_index(tmp_path / "absent.jsonl")


def test_an_index_cut_off_in_a_row(tmp_path: Path) -> None:
    path = written(tmp_path, ROW, BAD).path
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="line 3 is no JSON"):
        read_index(path)


def test_embeddings_of_another_index_are_refused(tmp_path: Path) -> None:
    index = written(tmp_path, ROW, BAD)
    beside = next(tmp_path.glob("*.safetensors"))
    other = written(tmp_path, ROW, name="other.jsonl")
    shutil.copy(next(tmp_path.glob("other.*.safetensors")), beside)
    with pytest.raises(ConfigError, match=r"\(1, 512\)"):
        index.embeddings()
    beside.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_index(index.path).embeddings()
    assert other.embeddings().shape == (1, 512)


def test_a_failed_write_leaves_the_old_index_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = written(tmp_path, ROW, BAD)

    def full(self: Path, target: Path) -> None:
        if target.suffix == ".jsonl":
            raise OSError(28, "No space left on device")
        original(self, target)

    original = Path.replace
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_index(old.path, tmp_path, [ROW], torch.ones(1, 512), {})
    monkeypatch.undo()
    again = read_index(old.path)
    assert again.rows == old.rows
    assert again.embeddings().shape == (2, 512)


def test_a_new_index_takes_the_place_of_the_old(tmp_path: Path) -> None:
    written(tmp_path, ROW, BAD)
    written(tmp_path, ROW)
    assert len(list(tmp_path.iterdir())) == 2
    assert read_index(tmp_path / "index.jsonl").embeddings().shape == (1, 512)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([replace(ROW, number=1)], "row 0 has the number 1"),
        ([replace(ROW, status="fine")], "status must be one of"),
        ([replace(ROW, sha256="")], "a row that is ok needs sha256"),
    ],
)
def test_rows_that_make_no_sense_are_not_written(rows: list[Row], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        written(tmp_path, *rows)
    assert not (tmp_path / "index.jsonl").exists()
