"""Find duplicate photos, and people with two names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .index import Index, write_index
from .people import People
from .rows import OK, PHASH, STATUSES, Edited, Rows
from .split import SplitSettings, clusters, faces_of, split_rows

NEAR = 4
"""Photos whose perceptual hashes differ in at most this many of 64 bits count as the same."""
PEOPLE = ("quarantine", "merge")


def dedupe(
    index: Index,
    output: Path,
    *,
    people: str = "quarantine",
    threshold: float = 0.6,
    split: SplitSettings | None = None,
) -> Index:
    """Write a new index with duplicates marked. Rows keep their numbers; none is removed.

    1. Photos with the same bytes: the first stays, the others become duplicates.
    2. Photos of a person that look the same (perceptual hash): the first stays. Photos of unknown people are not compared.
    3. People whose mean embeddings have a cosine above `threshold` count as one: "quarantine" keeps only the one with most photos;
       "merge" gives all their photos that person's name (and repeats step 2).

    Then the split is made again, with the index's settings or the given ones.

    Raises:
        ConfigError: the output cannot be written, or the settings are invalid.
    """
    if people not in PEOPLE:
        raise ConfigError(f"people must be one of {', '.join(PEOPLE)}, got {people!r}")
    embeddings = index.embeddings()
    edited = Edited.of(index.rows)
    same_bytes(edited)
    near_duplicates(edited)
    same_people(edited, embeddings, threshold, merge=people == "merge")
    if people == "merge":
        near_duplicates(edited)
    rows, split_facts = split_rows(Rows(edited), embeddings, split or settings_of(index.facts))
    facts = {**index.facts, "dedupe": {"people": people, "threshold": threshold}, "split": split_facts}
    return write_index(output, index.root, rows, embeddings, facts)


def settings_of(facts: Mapping[str, Any]) -> SplitSettings:
    """The split settings of an index."""
    names = ("share", "seed", "threshold")
    return SplitSettings(**{name: facts["split"][name] for name in names if name in facts.get("split", {})})


def same_bytes(rows: Edited) -> None:
    """Mark usable rows whose bytes equal those of an earlier row, whoever it shows."""
    first: dict[bytes, int] = {}
    digests = rows.records["sha256"]
    for place in np.flatnonzero(rows.status == STATUSES.index(OK)).tolist():
        if (kept := first.setdefault(digests[place].tobytes(), place)) != place:
            _refuse(rows, place, f"the same bytes as {rows.row(kept).source}")


def near_duplicates(rows: Edited) -> None:
    """Mark usable rows that look like an earlier photo of the same person."""
    everyone = Rows(rows)
    known = everyone.has_text("identity") & (rows.records["known"] & PHASH > 0)
    people = People(everyone.where(known & (rows.status == STATUSES.index(OK))))
    places = people.rows.places
    for person in np.flatnonzero(people.sizes > 1).tolist():
        kept: list[tuple[int, int]] = []
        for place in places[people.positions(person)].tolist():
            bits = int.from_bytes(rows.records["phash"][place].tobytes(), "big")
            twin = next((other for seen, other in kept if (bits ^ seen).bit_count() <= NEAR), None)
            if twin is None:
                kept.append((bits, place))
            else:
                _refuse(rows, place, f"looks like {rows.row(twin).source}")


def same_people(rows: Edited, embeddings: Tensor, threshold: float, merge: bool) -> None:
    """Merge people whose mean embeddings match, or set the smaller ones aside.

    The largest person keeps its name; among equals, the first.
    """
    faces = faces_of(Rows(rows), embeddings, unknown=False)
    places, sizes = faces.people.rows.places, faces.people.sizes.tolist()
    for group in clusters(faces.means, threshold):
        keeper = max(group, key=lambda person: (sizes[person], -person))
        for person in group:
            if person == keeper:
                continue
            # In a chain of similar people, the keeper itself may be less similar than the link between.
            cosine = float(torch.dot(faces.means[person], faces.means[keeper]))
            like = int(places[faces.people.firsts[keeper]])
            reason = f"{faces.name(person)} is {faces.name(keeper)}, who has more photos or came first (cosine {cosine:.2f})"
            for place in places[faces.people.positions(person)].tolist():
                if merge:
                    rows.rename(place, faces.name(keeper), like)
                else:
                    _refuse(rows, place, reason)


def _refuse(rows: Edited, place: int, reason: str) -> None:
    rows.refuse(place, "duplicate", reason)
