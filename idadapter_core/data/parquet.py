"""The Parquet file of an index, and its memory map with packed rows (`rows.Packed`).

Parquet is the format to keep, copy and read in other programs. But decoding its columns takes memory in every process, so training
reads a map next to it that all processes share. The map is written with the index, and rebuilt if it is missing or belongs to another
file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from ..errors import ConfigError
from ..extra import require
from ..files import StreamedTensors, read_metadata, replacing
from .columns import COLUMNS, hash_into, packed, people_of, require_sense, schema
from .jsonl import is_lines
from .rows import BATCH, RECORD, Packed, open_map

log = logging.getLogger(__name__)

VERSION = 2  # of the Parquet file; version 1 was JSON Lines
SUFFIX = ".parquet"
MAP_VERSION = "1"  # of the map; a map of another version is rebuilt
_KEY = "idadapter_index"  # metadata key of the facts in the file
_DIGEST = "digest"
# ---------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Head:
    """Header of an index, without the rows."""

    digest: str  # 16 hex digits of the facts and the rows
    facts: Mapping[str, Any]  # version, root, rows, embeddings, and further facts about the whole index


_WANTED = {"version": int, "root": str, "rows": int, "embeddings": str, _DIGEST: str}


def write_parquet(path: Path, batches: Iterable[Any], facts: Mapping[str, Any]) -> Head:
    """Write the Parquet file of an index. Raises OSError, or any error from making the batches.

    Args:
        batches: of `batch_of`, `BATCH` rows each, the last may have fewer.
        facts: plain values, including those of `_WANTED` except the digest.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    content = _content_digest(facts)
    try:
        with pq.ParquetWriter(path, schema(), compression="zstd", write_page_checksum=True) as writer:
            for batch in batches:
                hash_into(content, batch)
                writer.write_batch(batch, row_group_size=BATCH)
            digest = content.hexdigest()[:16]
            writer.add_key_value_metadata({_KEY: json.dumps({**facts, _DIGEST: digest}, allow_nan=False)})
    except pa.ArrowException as error:
        raise OSError(f"{error}") from error
    return Head(digest, facts)


def _content_digest(facts: Mapping[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(facts, separators=(",", ":"), allow_nan=False).encode())


def read_head(path: Path) -> Head:
    """Read the header of an index.

    Raises:
        ConfigError: not an index, or one of another version; names the file and the next step.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    if is_lines(path):
        new = path.with_suffix(SUFFIX)
        raise ConfigError(
            f"{path}: is an index in JSON Lines, the former kind. Run `python -m idadapter_core convert-index {path} {new}` once, "
            f"and name {new.name} from then on."
        )
    try:
        found = pq.read_metadata(path, memory_map=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}). Name the index that `python -m idadapter_core scan` wrote."
        ) from error
    except pa.ArrowException as error:
        raise ConfigError(
            f"{path}: is no Parquet file, or was cut off ({error}). Name the index that `python -m idadapter_core scan` wrote, or "
            "scan again."
        ) from error
    return _head(path, found)


def _head(path: Path, found: Any) -> Head:
    try:
        facts = json.loads((found.metadata or {})[_KEY.encode()])
    except (KeyError, ValueError):
        facts = None
    if not isinstance(facts, dict) or any(type(facts.get(key)) is not kind for key, kind in _WANTED.items()):
        raise ConfigError(
            f"{path}: is a Parquet file, but no index. Name the one that `python -m idadapter_core scan` wrote."
        )
    version, rows, digest = facts["version"], facts["rows"], facts.pop(_DIGEST)
    if version != VERSION:
        advice = "Update ComfyUI-IDAdapter" if version > VERSION else "Scan again"
        raise ConfigError(f"{path}: is of version {version}, this program reads version {VERSION}. {advice}.")
    if not found.schema.to_arrow_schema().equals(schema()):
        raise ConfigError(
            f"{path}: {_difference(found.schema.to_arrow_schema())}; it was edited. Scan again."
        )
    if found.num_rows != rows:
        raise ConfigError(f"{path}: has {found.num_rows} rows, but says {rows}; it was edited. Scan again.")
    return Head(digest, facts)


def _difference(found: Any) -> str:
    """Describe how the columns of a file differ from the schema."""
    for field in schema():
        if field.name not in found.names:
            return f"the column {field.name} is missing"
        if found.field(field.name).type != field.type:
            return f"the column {field.name} must be {field.type}, it is {found.field(field.name).type}"
    extra = [name for name in found.names if name not in COLUMNS]
    return f"there is an unknown column {extra[0]}" if extra else "the columns are in another order"


def batches_of(path: Path) -> Iterator[Any]:
    """Read the rows of an index as validated record batches of `BATCH` rows.

    Raises:
        ConfigError: the file is damaged or was edited.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    first = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                for batch in table.combine_chunks().to_batches():
                    require_sense(batch, first)
                    first += len(batch)
                    yield batch
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: is damaged ({error}). Bring back a copy, or scan again.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; it was edited. Scan again.") from error


# ---------------------------------------------------------------------------------------------------- the map


def map_path(path: Path, digest: str) -> Path:
    """Path of the map of an index with this digest."""
    return path.with_name(f"{path.stem}.{digest}.map")


def mapped_rows(path: Path, head: Head, name: Path | None = None) -> Packed:
    """Map the rows of an index from the file next to it, which is made if missing.

    Args:
        name: final name of a new index that is still being written under another one.

    Raises:
        ConfigError: the index is damaged, or the map cannot be written.
    """
    target = map_path(name or path, head.digest)
    stamp = _stamp(path, head)
    if not _is_of(target, stamp):
        try:
            with _only_one(target):
                if not _is_of(target, stamp):
                    if name is None:  # for an existing index, users do not expect this to take time
                        log.info("%s is missing and made anew, once for all processes", target)
                    write_map(path, target, head, stamp)
        except OSError as error:
            raise ConfigError(
                f"{target}: cannot be written ({error.strerror or error}). It is made once beside an index; free some space, or run "
                f"`python -m idadapter_core stats {path}` as somebody who may write there."
            ) from error
    try:
        return open_map(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{target}: cannot be read ({error}). Delete it: it is made again.") from error


def _stamp(path: Path, head: Head) -> dict[str, str]:
    """Identification of its index stored in a map. The end of a Parquet file has the sizes and ranges of all its content."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        footer = hashlib.sha256(file.read(length)).hexdigest()
    return {"map": MAP_VERSION, _DIGEST: head.digest, "footer": footer}


def _is_of(target: Path, stamp: Mapping[str, str]) -> bool:
    try:
        return read_metadata(target) == stamp
    except (OSError, safetensors.SafetensorError):
        return False


def write_map(path: Path, target: Path, head: Head, stamp: Mapping[str, str]) -> None:
    """Write the map of an index. Raises OSError, or ConfigError if the index does not match its header."""
    content = _content_digest(head.facts)
    names: list[Any] = []
    texts = 0
    rows = head.facts["rows"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "person": ("I32", (rows,)),
        "records": ("U8", (rows, RECORD.itemsize)),
        "status": ("U8", (rows,)),
        "split": ("U8", (rows,)),
    }
    with replacing(target) as temporary, StreamedTensors(temporary, shapes, "texts", stamp) as file:
        for batch in batches_of(path):
            hash_into(content, batch)
            records, joined = packed(batch, texts)
            file.add("records", records)
            file.add("status", records["status"])
            file.add("split", records["split"])
            file.add("texts", joined)
            names.append(batch.column("identity"))
            texts += len(joined)
        if content.hexdigest()[:16] != head.digest:
            raise ConfigError(
                f"{path}: its rows are not those that were written (digest {content.hexdigest()[:16]}, it says {head.digest}); it was "
                "edited. Scan again."
            )
        file.add("person", people_of(names))


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Context manager: one process of a machine at a time, if the system has such locks; the others wait for it."""
    try:
        import fcntl
    except ImportError:  # Windows: each process makes the map, the last one stays
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
