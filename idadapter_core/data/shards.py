"""Write the usable photos of an index as webdataset shards: few large files instead of millions of small ones.

The new index next to the shards has the same rows with the same numbers; usable rows point into the shards. Training from shards
therefore uses exactly the same samples as training from the photos. Any webdataset reader can read the shards, too.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import replacing, write_lines
from ..waiting import WAIT_TIMEOUT
from .index import IN_SHARD, Index, write_index
from .photos import PHOTO_SUFFIXES, suffix
from .ranks import Ranks, wait_for
from .rows import FIELDS, OK, Row, Rows
from .tars import Sample, read_shard

INDEX_NAME = "index.parquet"
_RECORD = "shards.json"


def write_shards(
    index: Index,
    folder: Path,
    *,
    photos: int = 1000,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Write shards of `photos` usable photos each, and an index of them. After an interruption, the same call continues.

    A sample has `key.jpg` (or .png, ...: the original bytes), `key.json` (the row) and `key.txt` (the caption); the key is the row's
    number. Unusable rows stay in the new index as a record, with their old source; their photos are not in the shards.

    Args:
        world: number of processes that share the work. This one has rank 0 and waits for the others, which call `write_share`.
        progress: callback (done, total), in photos.

    Raises:
        ConfigError: the folder holds shards of another index or size, or cannot be written.
        InputError: a photo is missing or has changed since the scan; or the other processes make no progress.
    """
    shards = _write_share(index, folder, photos, Ranks(0, world), progress)
    missing = set(range(shards.count)) - set(Ranks(0, world).share(shards.count))

    def left() -> int:
        missing.difference_update([number for number in missing if shards.is_whole(number)])
        return len(missing)

    wait_for(left, lambda count: f"{count} shards of {folder} are waited for", WAIT_TIMEOUT)
    facts = {**index.facts, "layout": "shards"}
    return write_index(folder / INDEX_NAME, folder, _with_places(index, shards), index.embeddings(), facts)


def write_share(
    index: Index,
    folder: Path,
    *,
    ranks: Ranks,
    photos: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write one process's share of the shards. Arguments and errors as in `write_shards`, which rank 0 calls."""
    _write_share(index, folder, photos, ranks, progress)


class _Shards:
    """The planned shards of an index in a folder."""

    def __init__(self, index: Index, folder: Path, photos: int) -> None:
        self.usable = index.usable()
        self.photos = photos
        self.count = -(-len(self.usable) // photos)
        self._folder = folder

    def path(self, number: int) -> Path:
        return self._folder / f"shard-{number:06d}.tar"

    def rows(self, number: int) -> Rows:
        return self.usable[number * self.photos : (number + 1) * self.photos]

    def is_whole(self, number: int) -> bool:
        if not self.path(number).exists():
            return False
        shard = read_shard(self.path(number))
        keys = [_key(place) for place in self.rows(number).column("number").tolist()]
        return not shard.problem and [sample.key for sample in shard.samples] == keys


def _write_share(
    index: Index, folder: Path, photos: int, ranks: Ranks, progress: Callable[[int, int], None]
) -> _Shards:
    if photos < 1:
        raise ConfigError(f"a shard needs at least 1 photo, got {photos}")
    shards = _Shards(index, folder, photos)
    share = ranks.share(shards.count)
    total = len(shards.usable[share.start * photos : share.stop * photos])
    done = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, {"index": index.digest, "photos": photos})
        for number in share:
            if not shards.is_whole(number):
                _write_shard(index, shards.rows(number), shards.path(number))
            done += len(shards.rows(number))
            progress(done, total)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror or error}). Free some space or choose another folder; whole shards are "
            "kept when the same command is given again."
        ) from error
    return shards


def _with_places(index: Index, shards: _Shards) -> Iterator[Row]:
    """The rows of an index; usable ones with their positions in the shards."""
    placed = itertools.chain.from_iterable(
        _placed(shards.path(number), shards.rows(number)) for number in range(shards.count)
    )
    for row in index.rows:
        yield next(placed) if row.status == OK else row


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Record which index the folder's shards belong to, or refuse a folder of another one."""
    path = folder / _RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        has_shards = any(entry.suffix.lower() == ".tar" for entry in folder.iterdir())
        if has_shards and path.exists():  # another process has recorded it meanwhile, and begun
            _claim(folder, record)
            return
        if has_shards:
            raise ConfigError(f"{folder} has .tar files of something else; choose an empty folder") from None
        write_lines(path, [json.dumps(record).encode()])
        return
    except ValueError:
        found = None
    if found != record:
        raise ConfigError(
            f"{folder} has shards of another index or of another size ({_RECORD}: {found}, now {record}); choose an empty folder"
        )


def _key(number: int) -> str:
    return f"{number:09d}"


def _write_shard(index: Index, rows: Sequence[Row], path: Path) -> None:
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            content = index.read(row)
            facts = {name: getattr(row, name) for name in FIELDS}
            _add(tar, f"{_key(row.number)}.{suffix(content)}", content)
            _add(tar, f"{_key(row.number)}.json", json.dumps(facts).encode())
            _add(tar, f"{_key(row.number)}.txt", row.caption.encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time or owner: the same photos give the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _placed(path: Path, rows: Sequence[Row]) -> Iterator[Row]:
    samples = read_shard(path).samples
    return (_at(path, row, sample) for row, sample in zip(rows, samples, strict=True))


def _at(path: Path, row: Row, sample: Sample) -> Row:
    photo = next(sample.parts[ending[1:]] for ending in PHOTO_SUFFIXES if ending[1:] in sample.parts)
    source = f"{path.name}{IN_SHARD}{sample.key}"
    return replace(row, source=source, offset=photo.offset, size=photo.size)
