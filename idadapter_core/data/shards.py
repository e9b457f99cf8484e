"""The usable photos of an index as webdataset shards: few large files in place of millions of small ones.

The index beside the shards has the same rows with the same numbers; those that are usable point into the shards. So a training
from shards is the same, sample by sample, as one from the photos. Any webdataset reader can read them, too.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import replacing, write_lines
from .index import FIELDS, IN_SHARD, Index, Row, write_index
from .photos import PHOTO_SUFFIXES, suffix
from .tars import Sample, read_shard

INDEX_NAME = "index.jsonl"
_RECORD = "shards.json"


def write_shards(
    index: Index,
    folder: Path,
    *,
    photos: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Write shards of so many usable photos each, and an index of them. Broken off, the same call goes on with the next shard.

    A sample has `key.jpg` (or .png, ...: the original bytes), `key.json` (the row) and `key.txt` (the caption); the key is the
    row's number. Rows that are not usable stay in the new index as a record, with the source they had; their photos are not there.

    Args:
        progress: is told how many photos are done, of how many.

    Raises:
        ConfigError: the folder holds shards of another index or size, or cannot be written.
        InputError: a photo is missing or has changed since the scan.
    """
    if photos < 1:
        raise ConfigError(f"a shard needs at least 1 photo, got {photos}")
    usable = index.usable()
    groups = [usable[start : start + photos] for start in range(0, len(usable), photos)]
    placed: dict[int, Row] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, {"index": index.digest, "photos": photos})
        for number, group in enumerate(groups):
            path = folder / f"shard-{number:06d}.tar"
            if not _is_whole(path, group):
                _write_shard(index, group, path)
            placed |= _placed(path, group)
            progress(len(placed), len(usable))
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror or error}). Free some space or choose another folder; whole shards are "
            "kept when the same command is given again."
        ) from error
    rows = [placed.get(row.number, row) for row in index.rows]
    return write_index(
        folder / INDEX_NAME, folder, rows, index.embeddings(), {**index.facts, "layout": "shards"}
    )


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Say whose shards are in the folder; refuse one that has others."""
    path = folder / _RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(entry.suffix.lower() == ".tar" for entry in folder.iterdir()):
            raise ConfigError(f"{folder} has .tar files of something else; choose an empty folder") from None
        write_lines(path, [json.dumps(record).encode()])
        return
    except ValueError:
        found = None
    if found != record:
        raise ConfigError(
            f"{folder} has shards of another index or of another size ({_RECORD}: {found}, now {record}); choose an empty folder"
        )


def _key(row: Row) -> str:
    return f"{row.number:09d}"


def _is_whole(path: Path, rows: Sequence[Row]) -> bool:
    if not path.exists():
        return False
    shard = read_shard(path)
    return not shard.problem and [sample.key for sample in shard.samples] == [_key(row) for row in rows]


def _write_shard(index: Index, rows: Sequence[Row], path: Path) -> None:
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            content = index.read(row)
            facts = {name: getattr(row, name) for name in FIELDS}
            _add(tar, f"{_key(row)}.{suffix(content)}", content)
            _add(tar, f"{_key(row)}.json", json.dumps(facts).encode())
            _add(tar, f"{_key(row)}.txt", row.caption.encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time and no owner: the same photos give the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _placed(path: Path, rows: Sequence[Row]) -> dict[int, Row]:
    samples = read_shard(path).samples
    return {row.number: _at(path, row, sample) for row, sample in zip(rows, samples, strict=True)}


def _at(path: Path, row: Row, sample: Sample) -> Row:
    photo = next(sample.parts[ending[1:]] for ending in PHOTO_SUFFIXES if ending[1:] in sample.parts)
    source = f"{path.name}{IN_SHARD}{sample.key}"
    return replace(row, source=source, offset=photo.offset, size=photo.size)
