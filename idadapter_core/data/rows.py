"""The rows of an index, packed: fixed-size records, and all texts in one array of bytes.

Packed rows are a few arrays, so a file of them can be memory-mapped (see `memory_map`). `Row` objects are made on demand. Lists of
rows (the usable ones, those of a person) are arrays of indices.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

OK = "ok"
STATUSES = (
    OK,
    "no_face",
    "many_faces",
    "small_face",
    "blur",
    "extreme_pose",
    "corrupt",
    "too_small",
    "id_mismatch",
    "duplicate",
)
SPLITS = ("train", "test", "")
CLASS_NOUNS = ("man", "woman", "person")
TEXTS = ("source", "identity", "caption", "reason")
"""Fields of variable length."""
BATCH = 1 << 16
"""Number of rows packed, written or read together."""


@dataclass(frozen=True, slots=True)
class Row:
    """A photo. Facts that a scan could not find have their defaults."""

    number: int  # position in the index, from 0; never changes, so it identifies the sample
    source: str  # posix path relative to the index's root (or absolute), or "shard.tar::key"
    sha256: str = ""  # of the photo's bytes
    width: int = 0  # pixels, upright
    height: int = 0
    identity: str = ""  # the person; "" if unknown
    caption: str = ""
    class_noun: str = "person"  # man, woman or person
    # Of the largest face: x1, y1, x2, y2 in upright pixels.
    box: tuple[float, float, float, float] | None = None
    # (5, 2) eyes, nose, mouth corners, in upright pixels.
    landmarks: tuple[tuple[float, float], ...] | None = None
    score: float = 0.0  # the detector's confidence, 0..1
    faces: int = 0  # number of faces found
    face_fraction: float = 0.0  # share of the image covered by the box
    yaw: float = 0.0  # degrees; see faces.pose
    pitch: float = 0.0
    sharpness: float = 0.0  # variance of the Laplacian of the aligned crop
    phash: str = ""  # perceptual hash, 64 bits as 16 hex digits
    split: str = ""  # train or test; "" for rows that are not usable
    status: str = OK
    reason: str = ""  # reason for a status other than ok
    offset: int = 0  # position of its bytes in the shard; 0: a separate file
    size: int = 0  # number of bytes


FIELDS = tuple(field.name for field in dataclasses.fields(Row))

RECORD = np.dtype(
    [
        ("number", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("faces", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("text", "<u8"),  # offset of the row's texts
        ("lengths", "<u4", (len(TEXTS),)),  # bytes of each text
        ("class_noun", "u1"),  # index into CLASS_NOUNS; the next fields likewise
        ("split", "u1"),
        ("status", "u1"),
        ("known", "u1"),  # flags for the next four fields: _SHA256 | ...
        ("sha256", "u1", (32,)),
        ("phash", "u1", (8,)),
        ("box", "<f8", (4,)),
        ("landmarks", "<f8", (5, 2)),
        ("score", "<f8"),
        ("face_fraction", "<f8"),
        ("yaw", "<f8"),
        ("pitch", "<f8"),
        ("sharpness", "<f8"),
    ]
)
"""A row without its texts. Unaligned, so it is the same on every machine."""
SHA256, PHASH, BOX, LANDMARKS = 1, 2, 4, 8
_UNPACK = struct.Struct("<4I3Q4I4B32s8s4d10d5d").unpack_from

# Lone surrogates (bytes of a file name that is not UTF-8) cannot be encoded as UTF-8. They are escaped as the last private-use
# character and their number; so is that character itself.
_ESCAPE = "\U0010fffd"
_ESCAPED = re.compile(f"{_ESCAPE}([0-9a-f]{{6}})")
_TO_ESCAPE = re.compile(f"[\ud800-\udfff{_ESCAPE}]")


def to_utf8(text: str) -> str:
    """Escape a text so that UTF-8 can hold it, whatever bytes a file name has."""
    return _TO_ESCAPE.sub(lambda found: f"{_ESCAPE}{ord(found[0]):06x}", text)


def from_utf8(text: str) -> str:
    """Inverse of `to_utf8`."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if _ESCAPE in text else text


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows as arrays."""

    records: NDArray[np.void]  # (rows,) RECORD
    texts: NDArray[np.uint8]  # (bytes,)
    # (rows,) indices into STATUSES; separate from the records, so that counting reads little.
    status: NDArray[np.uint8]
    split: NDArray[np.uint8]  # (rows,) indices into SPLITS
    person: NDArray[np.uint32]  # (rows,) index of the person's first row

    def __len__(self) -> int:
        return len(self.records)

    def row(self, place: int) -> Row:
        """The row at an index, from 0."""
        (
            number, width, height, faces, offset, size, text, n_source, n_identity, n_caption, n_reason, noun, split, status, known,
            sha256, phash, x1, y1, x2, y2, ax, ay, bx, by, cx, cy, dx, dy, ex, ey, score, fraction, yaw, pitch, sharpness,
        ) = _UNPACK(self.records.data, place * RECORD.itemsize)  # fmt: skip
        identity = n_source
        caption = identity + n_identity
        reason = caption + n_caption
        content = self.texts[text : text + reason + n_reason].tobytes()
        return Row(
            number,
            from_utf8(content[:identity].decode()),
            sha256.hex() if known & SHA256 else "",
            width,
            height,
            from_utf8(content[identity:caption].decode()),
            from_utf8(content[caption:reason].decode()),
            CLASS_NOUNS[noun],
            (x1, y1, x2, y2) if known & BOX else None,
            ((ax, ay), (bx, by), (cx, cy), (dx, dy), (ex, ey)) if known & LANDMARKS else None,
            score,
            faces,
            fraction,
            yaw,
            pitch,
            sharpness,
            phash.hex() if known & PHASH else "",
            SPLITS[split],
            STATUSES[status],
            from_utf8(content[reason:].decode()) if n_reason else "",
            offset,
            size,
        )


@dataclass(frozen=True, eq=False)
class Edited(Packed):
    """Packed rows with changes, for a new index. Its arrays are writable, except for records and texts."""

    # By index: the fields that differ from the arrays.
    changes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows) -> Edited:
        """All rows of an index, without changes yet."""
        packed = rows.packed
        changes = dict(packed.changes) if isinstance(packed, Edited) else {}
        copies = (packed.status.copy(), packed.split.copy(), packed.person.copy())
        return cls(packed.records, packed.texts, *copies, changes=changes)

    def __reduce__(self) -> NoReturn:
        raise TypeError("rows that are being edited belong to one process")

    def refuse(self, place: int, status: str, reason: str) -> None:
        """Give a row a status other than ok."""
        self.status[place] = STATUSES.index(status)
        self.split[place] = SPLITS.index("")
        self.changes[place] = {**self.changes.get(place, {}), "reason": reason}

    def rename(self, place: int, identity: str, like: int) -> None:
        """Give a row the identity of the row at `like`."""
        self.person[place] = self.person[like]
        self.changes[place] = {**self.changes.get(place, {}), "identity": identity}

    def row(self, place: int) -> Row:
        row = super().row(place)
        status, split = STATUSES[self.status[place]], SPLITS[self.split[place]]
        if place in self.changes or (row.status, row.split) != (status, split):
            return dataclasses.replace(
                row, **{"status": status, "split": split, **self.changes.get(place, {})}
            )
        return row


class Rows(Sequence[Row]):
    """A sequence of packed rows. Takes 4 bytes per row, or nothing for all rows.

    Indexing makes a new `Row` each time; a slice is another `Rows`. Equal to any sequence of equal rows.
    """

    def __init__(self, packed: Packed, places: NDArray[np.uint32] | None = None) -> None:
        self.packed = packed
        self._places = places

    @property
    def places(self) -> NDArray[np.uint32]:
        """(rows,) indices into the packed rows."""
        return np.arange(len(self.packed), dtype=np.uint32) if self._places is None else self._places

    def __len__(self) -> int:
        return len(self.packed) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> Rows: ...
    def __getitem__(self, key: int | slice) -> Row | Rows:
        if isinstance(key, slice):
            return Rows(self.packed, self.places[key])
        place = range(len(self))[key]  # handles negative numbers and the end
        return self.packed.row(place if self._places is None else int(self._places[place]))

    def __iter__(self) -> Iterator[Row]:
        return map(
            self.packed.row, range(len(self.packed)) if self._places is None else self._places_one_by_one()
        )

    def _places_one_by_one(self) -> Iterator[int]:
        """The indices as Python ints, converted in batches."""
        for start in range(0, len(self), BATCH):
            yield from self.places[start : start + BATCH].tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {len(self.packed)})"

    @property
    def status(self) -> NDArray[np.uint8]:
        """(rows,) indices into STATUSES."""
        return self._chosen(self.packed.status)

    @property
    def split(self) -> NDArray[np.uint8]:
        """(rows,) indices into SPLITS."""
        return self._chosen(self.packed.split)

    @property
    def person(self) -> NDArray[np.uint32]:
        """(rows,) person of each photo, equal for photos of one person. A photo of an unknown person counts as a person of its own."""
        return self._chosen(self.packed.person)

    def column(self, name: str) -> NDArray[Any]:
        """(rows, ...) one field of the records."""
        return self._chosen(self.packed.records[name])

    def has_text(self, name: str) -> NDArray[np.bool_]:
        """(rows,) whether a text (one of TEXTS) is not empty."""
        lengths: NDArray[np.bool_] = self._chosen(self.packed.records["lengths"][:, TEXTS.index(name)]) > 0
        return lengths

    def where(self, chosen: NDArray[np.bool_]) -> Rows:
        """The rows selected by a boolean array (rows,)."""
        return Rows(
            self.packed,
            np.flatnonzero(chosen).astype(np.uint32) if self._places is None else self.places[chosen],
        )

    def at(self, positions: NDArray[np.integer[Any]]) -> Rows:
        """The rows at positions in this sequence, in that order."""
        return Rows(self.packed, self.places[positions])

    def _chosen(self, array: NDArray[Any]) -> NDArray[Any]:
        return array if self._places is None else array[self._places]


def as_rows(rows: Sequence[Row]) -> Rows:
    """Pack rows in memory, unless they are already packed."""
    return rows if isinstance(rows, Rows) else Rows(pack(rows))


def pack(rows: Sequence[Row]) -> Packed:
    """Pack rows in memory, for rows made one by one. Indexes on disk are packed by columns instead."""
    records = np.zeros(len(rows), RECORD)
    texts = bytearray()
    for place, row in enumerate(rows):
        known = (
            SHA256 * bool(row.sha256)
            | PHASH * bool(row.phash)
            | BOX * (row.box is not None)
            | LANDMARKS * (row.landmarks is not None)
        )
        parts = [to_utf8(getattr(row, name)).encode() for name in TEXTS]
        records[place] = (
            row.number,
            row.width,
            row.height,
            row.faces,
            row.offset,
            row.size,
            len(texts),
            [len(part) for part in parts],
            CLASS_NOUNS.index(row.class_noun),
            SPLITS.index(row.split),
            STATUSES.index(row.status),
            known,
            np.frombuffer(bytes.fromhex(row.sha256 or "0" * 64), np.uint8),
            np.frombuffer(bytes.fromhex(row.phash or "0" * 16), np.uint8),
            row.box or 0.0,
            row.landmarks or 0.0,
            row.score,
            row.face_fraction,
            row.yaw,
            row.pitch,
            row.sharpness,
        )
        texts += b"".join(parts)
    first: dict[str, int] = {}
    person = [
        first.setdefault(row.identity, place) if row.identity else place for place, row in enumerate(rows)
    ]
    return Packed(
        records,
        np.frombuffer(bytes(texts), np.uint8),
        records["status"].copy(),
        records["split"].copy(),
        np.array(person, np.uint32),
    )


def in_batches(rows: Iterable[Row], size: int = BATCH) -> Iterator[list[Row]]:
    """Split rows into lists of `size`."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
