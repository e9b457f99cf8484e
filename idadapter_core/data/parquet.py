"""The file of an index, Parquet, and the map made of it: its rows packed as `rows.Packed` has them.

Parquet is what is kept, copied and read by other programs. But its columns have to be decoded, into memory of each process that
reads it; so beside it lies the map, which no process has for itself. It is made with the index, and once more where it is missing
or is not that of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import ConfigError
from ..extra import require
from ..files import StreamedTensors, read_metadata, replacing
from .jsonl import is_lines
from .rows import (
    BATCH,
    BOX,
    CLASS_NOUNS,
    LANDMARKS,
    OK,
    PHASH,
    RECORD,
    SHA256,
    SPLITS,
    STATUSES,
    TEXTS,
    Packed,
    Row,
    open_map,
    to_utf8,
)

log = logging.getLogger(__name__)

VERSION = 2  # of the Parquet file; version 1 was JSON Lines
SUFFIX = ".parquet"
MAP_VERSION = "1"  # of the map; another one is made anew
_KEY = "idadapter_index"  # of the facts, in the file's own metadata
_DIGEST = "digest"
_COLUMNS = {
    "number": "uint32",
    "source": "string",
    "sha256": "string",
    "width": "uint32",
    "height": "uint32",
    "identity": "string",
    "caption": "string",
    "class_noun": "string",
    "box": "double4",
    "landmarks": "double10",
    "score": "double",
    "faces": "uint32",
    "face_fraction": "double",
    "yaw": "double",
    "pitch": "double",
    "sharpness": "double",
    "phash": "string",
    "split": "string",
    "status": "string",
    "reason": "string",
    "offset": "uint64",
    "size": "uint64",
}
_WORDS = {"uint32": "a whole number", "uint64": "a whole number", "double": "a number", "string": "a text"}
_WORDS |= {"double4": "four numbers or null", "double10": "five pairs of numbers or null"}
_PLAIN = ("width", "height", "faces", "offset", "size", "score", "face_fraction", "yaw", "pitch", "sharpness")


def schema() -> Any:
    """The columns, of Arrow's kinds. `box` and `landmarks` are lists of 4 and 10 numbers."""
    pa = require("pyarrow")
    kinds = {"double4": pa.list_(pa.float64(), 4), "double10": pa.list_(pa.float64(), 10)}
    return pa.schema(
        [
            pa.field(name, kinds[kind] if kind in kinds else getattr(pa, kind.replace("double", "float64"))())
            for name, kind in _COLUMNS.items()
        ]
    )


# ---------------------------------------------------------------------------------------------------- batches


def batch_of(rows: Sequence[Row], first: int) -> Any:
    """Rows as an Arrow record batch.

    Args:
        first: the number that the first of them must have.

    Raises:
        ConfigError: names the row, the field and what is wrong with it.
    """
    pa = require("pyarrow")
    for place, row in enumerate(rows, first):
        if row.number != place:
            raise ConfigError(f"row {place} has the number {row.number}; rows are numbered from 0")
    arrays = []
    for field in schema():
        values: list[Any] = [getattr(row, field.name) for row in rows]
        if field.name in TEXTS:
            values = [to_utf8(value) for value in values]
        elif field.name == "landmarks":
            values = [value and [x for point in value for x in point] for value in values]
        try:
            arrays.append(pa.array(values, field.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            place = next(n for n, value in enumerate(values) if not _fits(pa, value, field.type))
            kind = _WORDS[_COLUMNS[field.name]]
            raise ConfigError(
                f"row {first + place}: {field.name} must be {kind}, got {values[place]!r:.60}"
            ) from None
    batch = pa.record_batch(arrays, schema=schema())
    require_sense(batch, first)
    return batch


def _fits(pa: Any, value: Any, kind: Any) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def require_sense(batch: Any, first: int) -> None:
    """See that each row of a batch makes sense.

    Raises:
        ConfigError: names the first row that does not, and why.
    """
    pc = require("pyarrow.compute")
    count = len(batch)

    def require_all(fine: Any, say: Callable[[Row], str]) -> None:
        fine = np.asarray(fine, bool)
        if not fine.all():
            place = int(np.argmin(fine))
            raise ConfigError(f"row {first + place}: {say(row_of(batch, place))}")

    def field(name: str) -> Any:
        return batch.column(name)

    for name in _COLUMNS:
        if name not in ("box", "landmarks"):
            require_all(pc.is_valid(field(name)), lambda row, name=name: f"{name} is null")  # type: ignore[misc]
    require_all(
        field("number").to_numpy() == np.arange(first, first + count),
        lambda row: f"number must be its place, got {row.number}",
    )
    for name, allowed in (("status", STATUSES), ("split", SPLITS), ("class_noun", CLASS_NOUNS)):
        require_all(
            pc.is_in(field(name), require("pyarrow").array(allowed)),
            lambda row, name=name, allowed=allowed: (  # type: ignore[misc]
                f"{name} must be one of {', '.join(entry or 'empty' for entry in allowed)}, got {getattr(row, name)!r:.60}"
            ),
        )
    for name, digits in (("sha256", 64), ("phash", 16)):
        require_all(
            pc.match_substring_regex(field(name), f"^([0-9a-f]{{{digits}}})?$"),
            lambda row, name=name, digits=digits: (
                f"{name} must be {digits} hex digits, got {getattr(row, name)!r:.80}"
            ),  # type: ignore[misc]
        )
    for name in ("score", "face_fraction", "yaw", "pitch", "sharpness"):
        require_all(
            np.isfinite(field(name).to_numpy()),
            lambda row, name=name: f"{name} must be a number, got {getattr(row, name)}",  # type: ignore[misc]
        )
    for name, width in (("box", 4), ("landmarks", 10)):
        values, _ = _lists(field(name), width)
        require_all(
            np.isfinite(values).all(1),
            lambda row, name=name: f"{name} must be numbers, got {getattr(row, name)}",  # type: ignore[misc]
        )
    require_all(pc.not_equal(field("source"), ""), lambda row: "source must be a path, got ''")
    is_ok, has_reason = (
        np.asarray(pc.equal(field("status"), OK)),
        np.asarray(pc.not_equal(field("reason"), "")),
    )
    require_all(is_ok | has_reason, lambda row: f"a row that is {row.status} needs a reason")
    require_all(~is_ok | ~has_reason, lambda row: f"a row that is ok has no reason, got {row.reason!r:.80}")
    there = {
        "sha256": pc.not_equal(field("sha256"), ""),
        "width": pc.not_equal(field("width"), 0),
        "height": pc.not_equal(field("height"), 0),
        "box": pc.is_valid(field("box")),
        "landmarks": pc.is_valid(field("landmarks")),
    }
    for name, present in there.items():
        require_all(~is_ok | np.asarray(present), lambda row, name=name: f"a row that is ok needs {name}")  # type: ignore[misc]


def row_of(batch: Any, place: int) -> Row:
    """One row of a batch, as it is, also where it makes no sense."""
    (values,) = batch.slice(place, 1).to_pylist()
    points = values["landmarks"]
    if points is not None:
        values["landmarks"] = tuple(zip(points[::2], points[1::2], strict=True))
    if values["box"] is not None:
        values["box"] = tuple(values["box"])
    return Row(**values)


def _lists(column: Any, width: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(rows, width) numbers of a column of lists, 0 where it is null, and (rows,) where it is not."""
    there = np.asarray(column.is_valid())
    values = np.zeros((len(column), width))
    values[there] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return values, there


def _hash(digest: Any, batch: Any) -> None:
    """Take the values of a batch into a digest: the same for the same rows, whatever wrote them."""
    pc = require("pyarrow.compute")
    for name, kind in _COLUMNS.items():
        column = batch.column(name)
        if kind == "string":
            digest.update(np.ascontiguousarray(pc.binary_length(column).to_numpy(), "<u4").data)
            digest.update(_bytes(column).data)
        elif kind in ("double4", "double10"):
            values, there = _lists(column, int(kind[6:]))
            digest.update(there.astype("u1").data)
            digest.update(np.ascontiguousarray(values, "<f8").data)
        else:
            digest.update(
                np.ascontiguousarray(
                    column.to_numpy(), {"uint32": "<u4", "uint64": "<u8", "double": "<f8"}[kind]
                ).data
            )


def _bytes(column: Any) -> NDArray[np.uint8]:
    """The bytes of a column of texts, one after the other."""
    _, offsets, data = column.buffers()
    if data is None:
        return np.zeros(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]


def _packed(batch: Any, texts_before: int) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
    """The records of a batch, and their texts, which come after so many bytes."""
    pa, pc = require("pyarrow"), require("pyarrow.compute")
    records = np.zeros(len(batch), RECORD)
    records["number"] = batch.column("number").to_numpy()
    for name in _PLAIN:
        records[name] = batch.column(name).to_numpy()
    for name, entries in (("class_noun", CLASS_NOUNS), ("split", SPLITS), ("status", STATUSES)):
        records[name] = pc.index_in(batch.column(name), pa.array(entries)).to_numpy()
    for name, bit, width in (("sha256", SHA256, 32), ("phash", PHASH, 8)):
        there = np.asarray(pc.not_equal(batch.column(name), ""))
        digits = bytes.fromhex(_bytes(batch.column(name)).tobytes().decode())
        records[name][there] = np.frombuffer(digits, np.uint8).reshape(-1, width)
        records["known"] |= (bit * there).astype("u1")
    for name, bit, width in (("box", BOX, 4), ("landmarks", LANDMARKS, 10)):
        values, there = _lists(batch.column(name), width)
        records[name] = values.reshape(records[name].shape)
        records["known"] |= (bit * there).astype("u1")
    for place, name in enumerate(TEXTS):
        records["lengths"][:, place] = pc.binary_length(batch.column(name)).to_numpy()
    sizes = records["lengths"].sum(1, dtype=np.uint64)
    records["text"] = texts_before + np.cumsum(sizes) - sizes
    joined = pc.binary_join_element_wise(*(batch.column(name) for name in TEXTS), "")
    return records, _bytes(joined)


# ---------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Head:
    """What an index says of itself, without its rows."""

    digest: str  # 16 hex digits, of the facts and the rows
    facts: Mapping[str, Any]  # version, root, rows, embeddings, and what else is known of all of it


_WANTED = {"version": int, "root": str, "rows": int, "embeddings": str, _DIGEST: str}


def write_parquet(path: Path, batches: Iterable[Any], facts: Mapping[str, Any]) -> Head:
    """Write the file of an index. Raises OSError, or whatever making the batches raises.

    Args:
        batches: of `batch_of`, each of `BATCH` rows but the last.
        facts: plain values, among them those of `_WANTED` but the digest.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    content = _content_digest(facts)
    try:
        with pq.ParquetWriter(path, schema(), compression="zstd", write_page_checksum=True) as writer:
            for batch in batches:
                _hash(content, batch)
                writer.write_batch(batch, row_group_size=BATCH)
            digest = content.hexdigest()[:16]
            writer.add_key_value_metadata({_KEY: json.dumps({**facts, _DIGEST: digest}, allow_nan=False)})
    except pa.ArrowException as error:
        raise OSError(f"{error}") from error
    return Head(digest, facts)


def _content_digest(facts: Mapping[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(facts, separators=(",", ":"), allow_nan=False).encode())


def read_head(path: Path) -> Head:
    """What an index says of itself.

    Raises:
        ConfigError: no index, or one of another version; names the file and says what to do.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    if is_lines(path):
        new = path.with_suffix(SUFFIX)
        raise ConfigError(
            f"{path}: is an index in JSON Lines, the former kind. Run `python -m idadapter_core.data convert {path} {new}` once, "
            f"and name {new.name} from then on."
        )
    try:
        found = pq.read_metadata(path, memory_map=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}). Name the index that `python -m idadapter_core.data scan` wrote."
        ) from error
    except pa.ArrowException as error:
        raise ConfigError(
            f"{path}: is no Parquet file, or was cut off ({error}). Name the index that `python -m idadapter_core.data scan` wrote, or "
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
            f"{path}: is a Parquet file, but no index. Name the one that `python -m idadapter_core.data scan` wrote."
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
    """Where the columns of a file are others than they should be."""
    for field in schema():
        if field.name not in found.names:
            return f"the column {field.name} is missing"
        if found.field(field.name).type != field.type:
            return f"the column {field.name} must be {field.type}, it is {found.field(field.name).type}"
    extra = [name for name in found.names if name not in _COLUMNS]
    return f"there is an unknown column {extra[0]}" if extra else "the columns are in another order"


def batches_of(path: Path) -> Iterator[Any]:
    """The rows of an index, `BATCH` at a time, as record batches that make sense.

    Raises:
        ConfigError: the file is damaged, or was edited.
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
    """The map of an index with this digest."""
    return path.with_name(f"{path.stem}.{digest}.map")


def mapped_rows(path: Path, head: Head, named: Path | None = None) -> Packed:
    """The rows of an index, mapped from the file beside it, which is made where it is missing.

    Args:
        named: the name that the index will have, where it is still another.

    Raises:
        ConfigError: the index is damaged, or the map cannot be written.
    """
    target = map_path(named or path, head.digest)
    stamp = _stamp(path, head)
    if not _is_of(target, stamp):
        try:
            with _only_one(target):
                if not _is_of(target, stamp):
                    log.info("%s is being made, once for all processes of this machine", target)
                    write_map(path, target, head, stamp)
        except OSError as error:
            raise ConfigError(
                f"{target}: cannot be written ({error.strerror or error}). It is made once beside an index; free some space, or run "
                f"`python -m idadapter_core.data stats {path}` as somebody who may write there."
            ) from error
    try:
        return open_map(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{target}: cannot be read ({error}). Delete it: it is made again.") from error


def _stamp(path: Path, head: Head) -> dict[str, str]:
    """What a map records of its index. The end of a Parquet file tells sizes and ranges of all that is in it."""
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
    """Make the map of an index. Raises OSError, or ConfigError where the index is not what it says."""
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
            _hash(content, batch)
            records, joined = _packed(batch, texts)
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
        file.add("person", _people(names))


def _people(identities: Sequence[Any]) -> NDArray[np.uint32]:
    """(rows,) place of the first row of the same person, from columns of identities."""
    pa = require("pyarrow")
    if not identities:
        return np.zeros(0, np.uint32)
    coded = pa.chunked_array(identities).dictionary_encode().unify_dictionaries().combine_chunks()
    codes = coded.indices.to_numpy()
    places = np.arange(len(codes), dtype=np.uint32)
    first = np.zeros(len(coded.dictionary), np.uint32)
    first[codes[::-1]] = places[::-1]  # the last of equal places to be written stays
    unknown = np.asarray(require("pyarrow.compute").equal(coded.dictionary, ""))
    return np.where(unknown[codes], places, first[codes]).astype(np.uint32)


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """One process of a machine at a time, as far as the system has such locks: the others wait for its end."""
    try:
        import fcntl
    except ImportError:  # Windows: each makes the map, the last one stays
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
