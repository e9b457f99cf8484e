"""Whose photos belong together."""

from __future__ import annotations

from collections.abc import Iterable

from .index import Row


def by_person(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each person, in their order, people in the order of their first row.

    A photo of nobody known is a person of its own, whatever others are called.
    """
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.identity, 0) if row.identity else ("", row.number), []).append(row)
    return found


def photos_beside_target(photos: int) -> int:
    """By how many photos a person of so many is known while one of them is to be learned: by the others, or by the only one."""
    return max(photos - 1, 1)
