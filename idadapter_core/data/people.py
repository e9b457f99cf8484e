"""Group photos by person."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .rows import Row, Rows, as_rows


class People(Sequence[Rows]):
    """The rows of each person, in order; people in the order of their first row.

    A photo of an unknown person is a person of its own. Stored as arrays: 12 bytes per row and 4 per person.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = as_rows(rows)
        codes = self.rows.person
        order, starts = _grouped(codes)
        firsts = order[starts]
        if (firsts[1:] < firsts[:-1]).any():  # the first row, which numbers a person, is not among these rows
            codes = np.empty_like(codes)
            codes[order] = np.repeat(firsts, np.diff(starts, append=len(codes)))
            order, starts = _grouped(codes)
        self.order = order  # (rows,) positions in `rows`, by person
        self._starts = starts
        self._of: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, person: int) -> Rows:  # type: ignore[override]
        return self.rows.at(self.positions(person))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(people,) number of rows of each person."""
        ends = np.append(self._starts[1:], len(self.rows)).astype(np.int64)
        return ends - self._starts

    def positions(self, person: int) -> NDArray[np.uint32]:
        """Positions of a person's rows in `rows`."""
        person = range(len(self))[person]
        end = self._starts[person + 1] if person + 1 < len(self) else len(self.rows)
        return self.order[self._starts[person] : end]

    @property
    def firsts(self) -> NDArray[np.uint32]:
        """(people,) position in `rows` of each person's first row."""
        return self.order[self._starts]

    @property
    def of(self) -> NDArray[np.uint32]:
        """(rows,) person of each row, as an index into this sequence."""
        if self._of is None:
            self._of = np.empty(len(self.rows), np.uint32)
            self._of[self.order] = np.repeat(np.arange(len(self), dtype=np.uint32), self.sizes)
        return self._of


def _grouped(codes: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Positions sorted by code, and the start of each code in them."""
    order = np.argsort(codes, kind="stable").astype(np.uint32)
    codes = codes[order]
    return order, np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]][: len(codes)]).astype(np.uint32)


def photos_beside_target(photos: int) -> int:
    """Number of reference photos of a person with this many photos, while one is the target: the others, or the only one."""
    return max(photos - 1, 1)
