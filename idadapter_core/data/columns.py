"""Rows as Arrow record batches, to read and write an index many rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..extra import require
from .rows import (
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
    Row,
    to_utf8,
)

COLUMNS = {
    "number": "uint32",
    "source": "string",
    "sha256": "string",
    "width": "uint32",
    "height": "uint32",
    "identity": "string",
    "caption": "string",
    "class_noun": "string",
    "box": "list",
    "landmarks": "list",
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
_LISTS = {"box": (4, "four numbers or null"), "landmarks": (10, "five pairs of numbers or null")}
_PLAIN = ("width", "height", "faces", "offset", "size", "score", "face_fraction", "yaw", "pitch", "sharpness")


def schema() -> Any:
    """The Arrow schema of an index."""
    pa = require("pyarrow")
    # Not fixed-size lists: older pyarrow cannot read nulls in them.
    kinds = {"double": pa.float64(), "list": pa.list_(pa.float64())}
    return pa.schema(
        [pa.field(name, kinds.get(kind) or getattr(pa, kind)()) for name, kind in COLUMNS.items()]
    )


def batch_of(rows: Sequence[Row], first: int) -> Any:
    """Convert rows to an Arrow record batch.

    Args:
        first: required number of the first row.

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
            kind = _LISTS[field.name][1] if field.name in _LISTS else _WORDS[COLUMNS[field.name]]
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
    """Check that each row of a batch is valid.

    Raises:
        ConfigError: names the first invalid row and the reason.
    """
    # Each check relies on the ones before.
    for fine, message in itertools.chain(_kinds(batch, first), _contradictions(batch)):
        is_fine = np.asarray(fine, bool)
        if not is_fine.all():
            place = int(np.argmin(is_fine))
            raise ConfigError(f"row {first + place}: {message(row_of(batch, place))}")


Check = tuple[Any, Callable[[Row], str]]  # (rows,) whether each is valid, and the message for one that is not


def _kinds(batch: Any, first: int) -> Iterator[Check]:
    """Check each value by itself."""
    pa, pc = require("pyarrow"), require("pyarrow.compute")

    def must_be(name: str, kind: str) -> Callable[[Row], str]:
        return lambda row: f"{name} must be {kind}, got {getattr(row, name)!r:.80}"

    for name in COLUMNS:
        if name not in _LISTS:
            yield pc.is_valid(batch.column(name)), must_be(name, "something, never null")
    numbers = np.arange(first, first + len(batch))
    yield batch.column("number").to_numpy() == numbers, must_be("number", "the row's place")
    yield pc.not_equal(batch.column("source"), ""), must_be("source", "a path")
    for name, allowed in (("status", STATUSES), ("split", SPLITS), ("class_noun", CLASS_NOUNS)):
        listed = ", ".join(entry or "empty" for entry in allowed)
        yield pc.is_in(batch.column(name), pa.array(allowed)), must_be(name, f"one of {listed}")
    for name, digits in (("sha256", 64), ("phash", 16)):
        fine = pc.match_substring_regex(batch.column(name), f"^([0-9a-f]{{{digits}}})?$")
        yield fine, must_be(name, f"{digits} hex digits")
    for name in ("score", "face_fraction", "yaw", "pitch", "sharpness"):
        yield np.isfinite(batch.column(name).to_numpy()), must_be(name, "a number")
    for name, (width, words) in _LISTS.items():
        lengths = pc.list_value_length(batch.column(name)).fill_null(width)
        yield pc.equal(lengths, width), must_be(name, words)
        yield np.isfinite(_lists(batch.column(name), width)[0]).all(1), must_be(name, words)


def _contradictions(batch: Any) -> Iterator[Check]:
    """Check that the values of each row fit together."""
    pc = require("pyarrow.compute")
    is_ok = np.asarray(pc.equal(batch.column("status"), OK))
    has_reason = np.asarray(pc.not_equal(batch.column("reason"), ""))
    yield is_ok | has_reason, lambda row: f"a row that is {row.status} needs a reason"
    yield ~is_ok | ~has_reason, lambda row: f"a row that is ok has no reason, got {row.reason!r:.80}"
    for name, nothing in (("sha256", ""), ("width", 0), ("height", 0), ("box", None), ("landmarks", None)):
        column = batch.column(name)
        there = pc.is_valid(column) if nothing is None else pc.not_equal(column, nothing)
        yield ~is_ok | np.asarray(there), partial(_needs, name)


def _needs(name: str, row: Row) -> str:
    return f"a row that is ok needs {name}"


def row_of(batch: Any, place: int) -> Row:
    """One row of a batch as stored, even if invalid."""
    (values,) = batch.slice(place, 1).to_pylist()
    points = values["landmarks"]
    if points is not None:
        values["landmarks"] = tuple(zip(points[::2], points[1::2], strict=False))
    if values["box"] is not None:
        values["box"] = tuple(values["box"])
    return Row(**values)


def _lists(column: Any, width: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(rows, width) numbers of a column of lists, 0 for null, and (rows,) whether they are not null."""
    there = np.asarray(column.is_valid())
    values = np.zeros((len(column), width))
    values[there] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return values, there


def hash_into(digest: Any, batch: Any) -> None:
    """Add the values of a batch to a digest: equal for equal rows, whichever program wrote them."""
    pc = require("pyarrow.compute")
    for name, kind in COLUMNS.items():
        column = batch.column(name)
        if kind == "string":
            digest.update(np.ascontiguousarray(pc.binary_length(column).to_numpy(), "<u4").data)
            digest.update(_bytes(column).data)
        elif name in _LISTS:
            values, there = _lists(column, _LISTS[name][0])
            digest.update(there.astype("u1").data)
            digest.update(np.ascontiguousarray(values, "<f8").data)
        else:
            digest.update(
                np.ascontiguousarray(
                    column.to_numpy(), {"uint32": "<u4", "uint64": "<u8", "double": "<f8"}[kind]
                ).data
            )


def _bytes(column: Any) -> NDArray[np.uint8]:
    """The concatenated bytes of a column of texts."""
    _, offsets, data = column.buffers()
    if data is None:
        return np.zeros(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]


def packed(batch: Any, texts_before: int) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
    """The records of a batch and their texts; `texts_before` bytes of text precede them."""
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
    for name, bit in (("box", BOX), ("landmarks", LANDMARKS)):
        values, there = _lists(batch.column(name), _LISTS[name][0])
        records[name] = values.reshape(records[name].shape)
        records["known"] |= (bit * there).astype("u1")
    for place, name in enumerate(TEXTS):
        records["lengths"][:, place] = pc.binary_length(batch.column(name)).to_numpy()
    sizes = records["lengths"].sum(1, dtype=np.uint64)
    records["text"] = texts_before + np.cumsum(sizes) - sizes
    joined = pc.binary_join_element_wise(*(batch.column(name) for name in TEXTS), "")
    return records, _bytes(joined)


def people_of(identities: Sequence[Any]) -> NDArray[np.uint32]:
    """(rows,) index of the first row of the same person, from columns of identities."""
    pa = require("pyarrow")
    if not identities:
        return np.zeros(0, np.uint32)
    coded = pa.chunked_array(identities).dictionary_encode().unify_dictionaries().combine_chunks()
    codes = coded.indices.to_numpy()
    places = np.arange(len(codes), dtype=np.uint32)
    first = np.zeros(len(coded.dictionary), np.uint32)
    first[codes[::-1]] = places[::-1]  # reversed, so that the first place of a code is kept
    unknown = np.asarray(require("pyarrow.compute").equal(coded.dictionary, ""))
    return np.where(unknown[codes], places, first[codes]).astype(np.uint32)
