"""Whose photos belong together: people as arrays are those that a table of names would give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from idadapter_core.data.people import People
from idadapter_core.data.rows import Edited, Row, Rows, as_rows


def by_name(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.identity, 0) if row.identity else ("", row.number), []).append(row)
    return list(found.values())


def require_the_same(rows: Rows) -> None:
    people, expected = People(rows), by_name(list(rows))
    assert [list(person) for person in people] == expected
    assert people.sizes.tolist() == [len(person) for person in expected]
    assert [rows[place] for place in people.firsts] == [person[0] for person in expected]
    assert all(rows[place] in expected[person] for place, person in enumerate(people.of))


@pytest.mark.parametrize("names", [1, 5, 40])
def test_people_are_those_of_their_names(names: int) -> None:
    """Also among some of the rows, when those by which people are numbered are left out, and in another order."""
    draw = random.Random(names)
    identities = [draw.choice(["", *(f"p{n}" for n in range(names))]) for _ in range(60)]
    rows = as_rows([Row(number, f"{number}.png", identity=name) for number, name in enumerate(identities)])
    require_the_same(rows)
    require_the_same(rows[7:])
    require_the_same(rows.where(np.array([draw.random() < 0.4 for _ in rows])))
    require_the_same(rows.at(np.array(draw.sample(range(60), 30))))
    require_the_same(rows[:0])


def test_people_of_rows_that_were_edited() -> None:
    rows = as_rows([Row(n, f"{n}.png", identity=name) for n, name in enumerate("abcab")])
    edited = Edited.of(rows)
    edited.rename(1, "c", like=2)
    edited.rename(4, "c", like=2)
    edited.refuse(0, "blur", "blurred")
    changed = Rows(edited)
    assert [row.identity for row in changed] == list("accac")
    assert [(row.status, row.reason) for row in changed][:2] == [("blur", "blurred"), ("ok", "")]
    require_the_same(changed)
    twice = Edited.of(changed)
    twice.refuse(1, "duplicate", "twice")
    assert list(Rows(twice)) == [
        changed[0],
        replace(changed[1], status="duplicate", reason="twice"),
        *changed[2:],
    ]
    assert rows[1].identity == "b"
