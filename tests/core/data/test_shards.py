"""Shards hold the same photos under the same numbers, each one seek away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idadapter_core.data import ranks, shards as sharding
from idadapter_core.data.index import Index, read_index
from idadapter_core.data.ranks import Ranks
from idadapter_core.data.shards import write_shards, write_share
from idadapter_core.errors import ConfigError, InputError
from tests.core.data.conftest import Scanned


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_and_back(scanned: Scanned, tmp_path: Path) -> None:
    made = write_shards(scanned.index, tmp_path / "shards", photos=5)
    read = read_index(tmp_path / "shards" / "index.parquet")
    assert read.rows == made.rows
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2
    assert [row.number for row in read.usable()] == [row.number for row in scanned.index.usable()]
    assert read.counts() == scanned.index.counts()
    torch.testing.assert_close(read.embeddings(), scanned.index.embeddings(), rtol=0, atol=0)
    for row in reversed(read.usable()):
        old = scanned.index.rows[row.number]
        assert (row.split, row.caption, row.identity, row.sha256) == (
            old.split,
            old.caption,
            old.identity,
            old.sha256,
        )
        np.testing.assert_array_equal(read.load(row), scanned.index.load(old))
    bad = [row for row in read.rows if row.status != "ok"]
    assert bad == [row for row in scanned.index.rows if row.status != "ok"]


def test_a_photo_is_one_seek_away(scanned: Scanned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_shards(scanned.index, tmp_path, photos=100)
    row = index.usable()[-1]
    monkeypatch.setattr(sharding.tarfile, "open", None)  # nobody walks through the tar
    assert row.offset > 512
    shard = next(tmp_path.glob("*.tar"))
    content = shard.read_bytes()[row.offset : row.offset + row.size]
    assert content == index.read(row)
    shard.write_bytes(shard.read_bytes()[: row.offset + 10])
    with pytest.raises(InputError, match="cannot be read.*too early"):
        index.load(row)


def test_webdataset_reads_them(scanned: Scanned, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(scanned.index, tmp_path, photos=5)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [int(sample["__key__"]) for sample in samples] == [row.number for row in scanned.index.usable()]
    row = scanned.index.usable()[0]
    assert samples[0]["png"] == scanned.index.read(row)
    assert samples[0]["txt"].decode() == row.caption
    assert json.loads(samples[0]["json"])["identity"] == row.identity


def test_broken_off_and_taken_up_again(
    scanned: Scanned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(scanned.index, tmp_path / "whole", photos=3)
    read = Index.read

    def full(self: Index, row: Any) -> bytes:
        if row.number == scanned.index.usable()[4].number:
            raise OSError(28, "No space left on device")
        return read(self, row)

    monkeypatch.setattr(Index, "read", full)
    with pytest.raises(ConfigError, match="No space left.*whole shards are kept"):
        write_shards(scanned.index, tmp_path / "cut", photos=3)
    assert sorted(bytes_of(tmp_path / "cut")) == ["shard-000000.tar", "shards.json"]
    monkeypatch.undo()

    written = []
    original = sharding._write_shard
    monkeypatch.setattr(
        sharding,
        "_write_shard",
        lambda *arguments: (written.append(arguments[-1].name), original(*arguments)),
    )
    write_shards(scanned.index, tmp_path / "cut", photos=3)
    assert written == ["shard-000001.tar", "shard-000002.tar"]
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_ranks_changes_nothing(scanned: Scanned, tmp_path: Path, world: int) -> None:
    """Also where there are more of them than shards."""
    write_shards(scanned.index, tmp_path / "alone", photos=3)
    for rank in range(1, world):
        write_share(scanned.index, tmp_path / "shared", ranks=Ranks(rank, world), photos=3)
    before = bytes_of(tmp_path / "shared")
    assert not any(name.startswith("index") for name in before)
    write_shards(scanned.index, tmp_path / "shared", photos=3, world=world)
    assert bytes_of(tmp_path / "shared") == bytes_of(tmp_path / "alone")


def test_shards_of_others_are_waited_for_until_they_are_whole(
    scanned: Scanned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "WAIT_TIMEOUT", 0.1)
    monkeypatch.setattr(ranks, "POLL", 0.05)
    write_share(scanned.index, tmp_path, ranks=Ranks(1, 2), photos=3)
    last = tmp_path / "shard-000002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:2000])
    with pytest.raises(InputError, match="no other process has done anything.*1 shards of .* are waited for"):
        write_shards(scanned.index, tmp_path, photos=3, world=2)
    assert not (tmp_path / "index.parquet").exists()
    write_share(scanned.index, tmp_path, ranks=Ranks(1, 2), photos=3)
    assert last.read_bytes() == whole
    assert len(write_shards(scanned.index, tmp_path, photos=3, world=2).usable()) == 9


def test_another_rank_may_begin_at_the_same_moment(
    scanned: Scanned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards are there when this one looks around, and its record was not before."""
    look = Path.iterdir

    def late(self: Path) -> Any:
        monkeypatch.undo()
        write_share(scanned.index, tmp_path, ranks=Ranks(1, 2), photos=3)
        return look(self)

    monkeypatch.setattr(Path, "iterdir", late)
    write_shards(scanned.index, tmp_path, photos=3, world=2)
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_a_damaged_shard_is_written_again(scanned: Scanned, tmp_path: Path) -> None:
    write_shards(scanned.index, tmp_path, photos=3)
    before = bytes_of(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    write_shards(scanned.index, tmp_path, photos=3)
    assert bytes_of(tmp_path) == before


def test_a_folder_of_something_else_is_refused(scanned: Scanned, tmp_path: Path) -> None:
    write_shards(scanned.index, tmp_path / "a", photos=3)
    with pytest.raises(ConfigError, match="another size"):
        write_shards(scanned.index, tmp_path / "a", photos=5)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.tar").touch()
    with pytest.raises(ConfigError, match="empty folder"):
        write_shards(scanned.index, tmp_path / "b")
    with pytest.raises(ConfigError, match="at least 1"):
        write_shards(scanned.index, tmp_path / "c", photos=0)


def test_a_photo_that_changed_since_the_scan(package: Path, few: Path, tmp_path: Path) -> None:
    from idadapter_core.data.scan import scan
    from idadapter_core.data.sources import list_photos

    index = scan(list_photos(few / "person_00"), tmp_path / "i.parquet", package=package, provider="cpu")
    (few / "person_00" / "1.png").write_bytes(b"changed")
    with pytest.raises(InputError, match="has changed since the scan"):
        write_shards(index, tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*.tar"))
