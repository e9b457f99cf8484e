"""The index is read strictly and written whole.

One file, because its tests share what a row and an index are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from idadapter_core.data import parquet as parquet_module, rows as rows_module
from idadapter_core.data.convert import convert
from idadapter_core.data.index import Index, read_index, write_index
from idadapter_core.data.rows import Row, as_rows
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


def written(folder: Path, *rows: Row, name: str = "index.parquet") -> Index:
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
    index = read_index(moved / "index.parquet")
    assert index.root == moved / "photos"
    row = index.usable()[0]
    np.testing.assert_array_equal(index.load(row), scanned.index.load(row))


def test_photos_elsewhere_are_found_by_their_whole_path(scanned: Scanned, tmp_path: Path) -> None:
    old = scanned.index
    index = write_index(tmp_path / "a.parquet", old.root, old.rows, old.embeddings(), old.facts)
    assert index.facts["root"] == scanned.photos.as_posix()
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
    index = read_index(moved / "index.parquet")
    row = index.usable()[0]
    change(index.root / row.source)
    with pytest.raises(InputError, match=f"{row.source}.*{message}"):
        index.load(row)


def spoil(path: Path, change: Callable[[Any], Any], **facts: Any) -> None:
    """Write an index again with other columns or facts, as another program might."""
    table = pq.read_table(path)
    told = json.loads(pq.read_metadata(path).metadata[b"idadapter_index"])
    metadata = {"idadapter_index": json.dumps({**told, **facts})}
    pq.write_table(change(table.replace_schema_metadata(None)).replace_schema_metadata(metadata), path)


def with_column(name: str, values: list[Any], kind: Any = None) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        place = table.column_names.index(name)
        return table.set_column(place, name, pa.array(values, kind or table.schema.field(name).type))

    return change


def same(table: Any) -> Any:
    return table


SPOILED: list[tuple[str, Callable[[Any], Any], dict[str, Any], str]] = [
    ("row missing", lambda table: table[:1], {}, "has 1 rows, but says 2"),
    ("newer", same, {"version": 3}, "version 3.*reads version 2. Update ComfyUI-IDAdapter"),
    ("older", same, {"version": 1}, "version 1.*reads version 2. Scan again"),
    ("no facts", same, {"rows": "2"}, "is a Parquet file, but no index"),
    ("column missing", lambda table: table.drop_columns(["sha256"]), {}, "the column sha256 is missing"),
    ("column unknown", lambda t: t.append_column("hue", [[1, 2]]), {}, "there is an unknown column hue"),
    ("other kind", with_column("width", ["10", "0"], pa.string()), {}, "width must be uint32, it is string"),
    ("numbers", with_column("number", [0, 2]), {}, "row 1: number must be the row's place, got 2"),
    ("unknown status", with_column("status", ["ok", "fine"]), {}, "row 1: status must be one of ok, no_face"),
    (
        "unknown split",
        with_column("split", ["val", ""]),
        {},
        "split must be one of train, test, empty, got 'val'",
    ),
    ("hex", with_column("sha256", ["0" * 63 + "g", ""]), {}, "row 0: sha256 must be 64 hex digits, got '000"),
    ("not finite", with_column("yaw", [0.0, float("nan")]), {}, "row 1: yaw must be a number, got nan"),
    (
        "null",
        with_column("caption", [None, ""]),
        {},
        "row 0: caption must be something, never null, got None",
    ),
    ("no path", with_column("source", ["", "b.png"]), {}, "row 0: source must be a path"),
    ("short list", with_column("landmarks", [[1.0] * 9, None]), {}, "row 0: landmarks must be five pairs"),
    (
        "null in a list",
        with_column("box", [[1.0, None, 2.0, 3.0], None]),
        {},
        "row 0: box must be four numbers",
    ),
    ("ok without a face", with_column("box", [None, None]), {}, "row 0: a row that is ok needs box"),
    (
        "ok with a reason",
        with_column("reason", ["x", "y"]),
        {},
        "row 0: a row that is ok has no reason, got 'x'",
    ),
    ("bad without a reason", with_column("reason", ["", ""]), {}, "row 1: a row that is blur needs a reason"),
    ("another value", with_column("caption", ["a", "b"]), {}, "its rows are not those that were written"),
    ("another fact", same, {"recognizer": "s"}, "its rows are not those that were written"),
]


@pytest.mark.parametrize(
    ("change", "facts", "message"), [case[1:] for case in SPOILED], ids=[case[0] for case in SPOILED]
)
def test_an_index_that_makes_no_sense(
    change: Callable[[Any], Any], facts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Also where the map of the index that it was still lies beside it."""
    path = written(tmp_path, ROW, BAD).path
    spoil(path, change, **facts)
    with pytest.raises(ConfigError, match=message) as raised:
        read_index(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"no index\n", b"PAR1"])
def test_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"index\.parquet.*[Ss]can"):
        read_index(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_index(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ConfigError, match="is a Parquet file, but no index"):
        read_index(path)


@pytest.mark.parametrize("damage", ["cut off", "turned over"])
def test_a_damaged_file(damage: str, tmp_path: Path) -> None:
    """The second kind is found as soon as the rows are read: when the map is made."""
    path = written(tmp_path, ROW, BAD).path
    content = bytearray(path.read_bytes())
    if damage == "cut off":
        path.write_bytes(content[:-30])
    else:
        source = pq.read_metadata(path).row_group(0).column(1)
        content[source.data_page_offset + source.total_compressed_size - 1] ^= 0x40
        path.write_bytes(content)
        next(tmp_path.glob("*.map")).unlink()
    with pytest.raises(ConfigError, match="cut off|is damaged") as raised:
        read_index(path)
    assert str(path) in str(raised.value)


# ------------------------------------------------------------------------------------------------ the map


def test_a_map_is_made_where_there_is_none_or_another(tmp_path: Path) -> None:
    made = written(tmp_path, ROW, BAD)
    (beside,) = tmp_path.glob("*.map")
    content = beside.read_bytes()
    for damaged in (None, b"", content[:-1], content.replace(b'"map":"1"', b'"map":"0"')):
        beside.unlink()
        if damaged is not None:
            beside.write_bytes(damaged)
        assert read_index(made.path).rows == [ROW, BAD]
        assert beside.read_bytes() == content
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".map", ".parquet", ".safetensors"]


def test_a_map_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ROW, BAD).path
    next(tmp_path.glob("*.map")).unlink()

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigError, match=r"\.map: cannot be written \(Permission denied\).*core stats"):
        read_index(path)


def test_an_open_index_outlives_its_files(tmp_path: Path) -> None:
    """Another one takes the place of the files that it was read from, and not of what they say."""
    old = read_index(written(tmp_path, ROW, BAD).path)
    written(tmp_path, replace(ROW, caption="new"))
    assert old.rows == [ROW, BAD]
    assert read_index(old.path).rows == [replace(ROW, caption="new")]


def test_processes_that_do_not_fork_map_it_again(tmp_path: Path) -> None:
    index = written(tmp_path, ROW, replace(ROW, number=1, split="test"), replace(BAD, number=2))
    content = pickle.dumps(index.usable("test"))
    assert len(content) < 1000
    assert pickle.loads(content) == index.usable("test")
    in_memory = as_rows([ROW, replace(BAD, number=7)])
    assert pickle.loads(pickle.dumps(in_memory)) == in_memory


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    rows = [
        replace(ROW, number=n, identity=f"p{n // 2}", split="test" if n % 3 else "train") for n in range(7)
    ]
    index = written(tmp_path, *rows)
    assert list(index.rows) == rows == [index.rows[n] for n in range(7)]
    assert index.rows[-1] == rows[-1]
    assert index.rows[2:6][::2] == rows[2:6:2]
    assert index.usable("test")[1:] == [rows[2], rows[4], rows[5]]
    assert rows[3] in index.rows
    assert index.rows != rows[:-1] != index.rows[:3]
    with pytest.raises(IndexError):
        index.rows[7]


def test_more_rows_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With people whose photos are in several of them, texts that UTF-8 cannot hold, and facts that are not known."""
    for module in (rows_module, parquet_module):
        monkeypatch.setattr(module, "BATCH", 3)
    monkeypatch.setattr(rows_module.in_batches, "__defaults__", (3,))
    rows = []
    for number in range(10):
        names = {"identity": f"\udcff{number % 4}" if number % 4 else "", "source": f"{number}\U0010fffd.png"}
        row = replace(
            ROW, number=number, caption="é" * (number % 3), phash="0123456789abcdef" * (number % 2), **names
        )
        rows.append(
            row if number % 5 else replace(row, status="blur", reason="blurred", box=None, landmarks=None)
        )
    index = written(tmp_path, *rows)
    assert pq.read_metadata(index.path).num_row_groups == 4
    assert pq.read_table(index.path)["source"].to_pylist()[1].startswith("1\U0010fffd")
    assert read_index(index.path).rows == rows
    assert index.rows.person.tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 8, 1]
    assert as_rows(rows) == rows
    assert as_rows(rows).person.tolist() == index.rows.person.tolist()


# ------------------------------------------------------------------------------------------------ JSON Lines


def as_lines(index: Index, path: Path, change: Callable[[list[dict]], object] = lambda lines: None) -> Path:
    """The same index as earlier versions wrote it, with its embeddings beside it."""
    lines = [{**index.facts, "version": 1}, *map(dataclasses.asdict, index.rows)]
    change(lines)
    content = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    name = index.facts["embeddings"]
    shutil.copy(
        index.path.with_name(f"{index.path.stem}.{name}.safetensors"),
        path.with_name(f"{path.stem}.{name}.safetensors"),
    )
    return path


def test_an_index_in_json_lines_is_converted_by_one_command(tmp_path: Path) -> None:
    """Its digest stays, so a run that was begun with it goes on; it is not that of another index made of it."""
    index = written(tmp_path, ROW, BAD)
    old = as_lines(index, tmp_path / "old.jsonl")
    with pytest.raises(ConfigError, match=r"convert-index .*old\.jsonl .*old\.parquet` once"):
        read_index(old)
    (tmp_path / "new").mkdir()
    made = convert(old, tmp_path / "new" / "i.parquet")
    read = read_index(made.path)
    assert read.rows == index.rows
    assert read.digest == made.digest == hashlib.sha256(old.read_bytes()).hexdigest()[:16]
    assert read.root == tmp_path / "photos"
    assert read.facts["recognizer"] == "r"
    torch.testing.assert_close(read.embeddings(), index.embeddings(), rtol=0, atol=0)
    again = write_index(tmp_path / "again.parquet", read.root, read.rows, read.embeddings(), read.facts)
    assert again.digest != read.digest
    with pytest.raises(ConfigError, match="no index in JSON Lines"):
        convert(made.path, tmp_path / "no.parquet")


SPOILED_LINES: list[tuple[str, Callable[[list[dict]], object], str]] = [
    ("row missing", lambda lines: lines.pop(), "1 rows, but its first line says 2"),
    ("row twice", lambda lines: lines.append(lines[-1]), "line 4: number must be 2, got 1"),
    ("other version", lambda lines: lines[0].update(version=2), "version 2.*reads JSON Lines of version 1"),
    ("no facts", lambda lines: lines.pop(0), "its first line is not that of an index"),
    ("field missing", lambda lines: lines[1].pop("sha256"), "line 2 lacks sha256"),
    ("field unknown", lambda lines: lines[1].update(colour="red"), "line 2 has unknown colour"),
    (
        "unknown status",
        lambda lines: lines[2].update(status="fine"),
        "line 3: status must be one of ok, no_face",
    ),
    ("wrong type", lambda lines: lines[1].update(width="10"), "width must be a whole number, got '10'"),
    ("true for a number", lambda lines: lines[1].update(width=True), "width must be a whole number"),
    ("short box", lambda lines: lines[1].update(box=[1, 2, 3]), "box must be four numbers or null"),
    ("bad without a reason", lambda lines: lines[2].update(reason=""), "a row that is blur needs a reason"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in SPOILED_LINES], ids=[case[0] for case in SPOILED_LINES]
)
def test_json_lines_that_make_no_sense(
    change: Callable[[list[dict]], object], message: str, tmp_path: Path
) -> None:
    old = as_lines(written(tmp_path, ROW, BAD), tmp_path / "old.jsonl", change)
    with pytest.raises(ConfigError, match=message):
        convert(old, tmp_path / "new.parquet")
    assert not (tmp_path / "new.parquet").exists()


def test_json_lines_cut_off_in_a_row(tmp_path: Path) -> None:
    old = as_lines(written(tmp_path, ROW, BAD), tmp_path / "old.jsonl")
    old.write_bytes(old.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="line 3 is no JSON"):
        convert(old, tmp_path / "new.parquet")


# ------------------------------------------------------------------------------------------------ writing


def test_embeddings_of_another_index_are_refused(tmp_path: Path) -> None:
    index = written(tmp_path, ROW, BAD)
    beside = next(tmp_path.glob("*.safetensors"))
    other = written(tmp_path, ROW, name="other.parquet")
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
        if target.suffix == ".parquet":
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
    assert len(list(tmp_path.iterdir())) == 3
    assert read_index(tmp_path / "index.parquet").embeddings().shape == (1, 512)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([replace(ROW, number=1)], "row 0 has the number 1"),
        ([replace(ROW, status="fine")], "status must be one of"),
        ([replace(ROW, sha256="")], "a row that is ok needs sha256"),
        ([ROW, replace(ROW, number=1, width="10")], "row 1: width must be a whole number, got '10'"),
        ([replace(ROW, height=-1)], "row 0: height must be a whole number, got -1"),
        ([replace(ROW, box=(1, 2, 3))], "row 0: box must be four numbers or null"),
        ([replace(ROW, landmarks=((0, 1),) * 4)], "row 0: landmarks must be five pairs of numbers or null"),
        ([replace(ROW, yaw=float("inf"))], "row 0: yaw must be a number, got inf"),
    ],
)
def test_rows_that_make_no_sense_are_not_written(rows: list[Row], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        written(tmp_path, *rows)
    assert not (tmp_path / "index.parquet").exists()


def test_as_many_rows_as_embeddings(tmp_path: Path) -> None:
    for rows in ([ROW], [ROW, BAD, replace(BAD, number=2)]):
        with pytest.raises(ConfigError, match=rf"{len(rows)} rows need embeddings"):
            write_index(tmp_path / "i.parquet", tmp_path, rows, torch.zeros(2, 512), {})
    with pytest.raises(ConfigError, match="must end in .parquet"):
        write_index(tmp_path / "i.jsonl", tmp_path, [], torch.zeros(0, 512), {})


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    """However they come: in one piece, one by one, or from another index."""
    one = written(tmp_path, ROW, BAD)
    other = write_index(tmp_path / "b.parquet", one.root, iter(one.rows), one.embeddings(), one.facts)
    assert other.path.read_bytes() == one.path.read_bytes()
    assert other.digest == one.digest != written(tmp_path, ROW, replace(BAD, caption="a")).digest


def test_without_pyarrow_the_file_to_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, ROW, BAD).path
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"need pyarrow.*requirements-train\.txt"):
        read_index(path)
