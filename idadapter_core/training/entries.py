"""Required cache entries of a run, as arrays: with millions of photos, objects would take gigabytes in each process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..data.references import PhotoVariant, variants_of
from ..data.rows import Row, Rows
from .samples import place

KEY_BYTES = 16
Keys = NDArray[np.uint64]  # (entries, 2), most significant first: sorted like their hex digits


@dataclass(frozen=True)
class Entry:
    """A cache entry: the latents of a target, or the features of a photo."""

    key: str
    photo: PhotoVariant
    mirrored: bool = False  # for targets


def latents_key(row: Row, mirrored: bool) -> str:
    square = place(row, 1, mirrored)
    return _digest(row.sha256, square.left, square.top, square.side, mirrored)


def photo_key(photo: PhotoVariant) -> str:
    return _digest(photo.row.sha256, photo.row.box, photo.row.landmarks, photo.variant)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[: 2 * KEY_BYTES]


def keys_of(digits: Sequence[str]) -> Keys:
    """Parse keys from hex digits."""
    return np.frombuffer(bytes.fromhex("".join(digits)), ">u8").astype(np.uint64).reshape(-1, 2)


class Entries(Sequence[Entry]):
    """Entries of one kind, with unique keys. 25 bytes each; `Entry` objects are made on demand."""

    def __init__(
        self,
        splits: tuple[Rows, ...],
        split: NDArray[np.uint8],
        position: NDArray[np.uint32],
        detail: NDArray[np.uint32],
        keys: Keys,
        is_latents: bool,
    ) -> None:
        self._splits, self._split, self._position, self._detail = splits, split, position, detail
        self.keys = keys
        self._is_latents = is_latents

    @classmethod
    def latents(cls, splits: tuple[Rows, ...], mirrored: Rows | None) -> Entries:
        """Latents of every row as a target and, if `mirrored` is given, of these rows of the first split mirrored."""
        lists = [(number, np.arange(len(rows)), 0) for number, rows in enumerate(splits)]
        if mirrored is not None:
            lists.append((0, np.arange(len(mirrored)), 1))
        return cls._of(splits, [(n, at, np.full(len(at), detail)) for n, at, detail in lists], True)

    @classmethod
    def photos(cls, splits: tuple[Rows, ...], references: int) -> Entries:
        """Features of every photo that a sample may use, with variants if a person has too few photos; 0 references: no variants."""
        lists = []
        for number, rows in enumerate(splits):
            lists.append((number, *variants_of(rows, references)))
        return cls._of(splits, lists, False)

    @classmethod
    def _of(
        cls,
        splits: tuple[Rows, ...],
        lists: Sequence[tuple[int, NDArray[np.integer], NDArray[np.integer]]],
        is_latents: bool,
    ) -> Entries:
        split = np.concatenate([np.full(len(at), number, np.uint8) for number, at, _ in lists])
        position = np.concatenate([at for _, at, _ in lists]).astype(np.uint32)
        detail = np.concatenate([details for _, _, details in lists]).astype(np.uint32)
        found = cls(splits, split, position, detail, np.zeros((len(split), 2), np.uint64), is_latents)
        for first in range(0, len(found), 1 << 16):
            part = range(first, min(first + (1 << 16), len(found)))
            found.keys[part.start : part.stop] = keys_of([found._key(number) for number in part])
        order = np.lexsort((found.keys[:, 1], found.keys[:, 0]))  # stable: the first of equal keys is kept
        ordered = found.keys[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (ordered[1:] != ordered[:-1]).any(1)
        return found if is_first.all() else found._at(np.sort(order[is_first]))

    def _key(self, number: int) -> str:
        row, detail = self._row(number), int(self._detail[number])
        return latents_key(row, bool(detail)) if self._is_latents else photo_key(PhotoVariant(row, detail))

    def _row(self, number: int) -> Row:
        rows = self._splits[int(self._split[number])]
        return rows[int(self._position[number])]

    def __len__(self) -> int:
        return len(self._split)

    @overload
    def __getitem__(self, key: int) -> Entry: ...
    @overload
    def __getitem__(self, key: slice) -> Entries: ...
    def __getitem__(self, key: int | slice) -> Entry | Entries:
        if isinstance(key, slice):
            return self._at(key)
        number = range(len(self))[key]
        detail = int(self._detail[number])
        digits = "".join(f"{half:016x}" for half in self.keys[number].tolist())
        if self._is_latents:
            return Entry(digits, PhotoVariant(self._row(number)), bool(detail))
        return Entry(digits, PhotoVariant(self._row(number), detail))

    def __iter__(self) -> Iterator[Entry]:
        return (self[number] for number in range(len(self)))

    def where(self, chosen: NDArray[np.bool_]) -> Entries:
        """Select entries by a boolean array (entries,)."""
        return self._at(chosen)

    def _at(self, chosen: slice | NDArray[np.generic]) -> Entries:
        arrays = (self._split[chosen], self._position[chosen], self._detail[chosen], self.keys[chosen])
        return Entries(self._splits, *arrays, self._is_latents)
