"""Photos that are there twice, and people who are there under two names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .index import OK, Index, Row, write_index
from .split import SplitSettings, clusters, people_of, split_rows

NEAR = 4
"""Perceptual hashes that differ in this many of their 64 bits, or fewer, are of the same photo."""
PEOPLE = ("quarantine", "merge")


def dedupe(
    index: Index,
    output: Path,
    *,
    people: str = "quarantine",
    threshold: float = 0.6,
    split: SplitSettings | None = None,
) -> Index:
    """Write a new index in which every photo and every person is there once. Rows keep their numbers; none is removed.

    1. Photos with the same bytes: the first stays, the others become duplicates.
    2. Photos of a person that look the same (perceptual hash): the first stays. Photos of nobody known are not compared.
    3. People whose mean embeddings have a cosine above `threshold` are one: with "quarantine" only the one with most photos stays,
       with "merge" the photos of all get its name (and go through step 2 again).

    Then the split is made anew, with the settings that the index has, or with other ones.

    Raises:
        ConfigError: the output cannot be written, or the settings make no sense.
    """
    if people not in PEOPLE:
        raise ConfigError(f"people must be one of {', '.join(PEOPLE)}, got {people!r}")
    embeddings = index.embeddings()
    rows = near_duplicates(same_bytes(index.rows))
    rows = same_people(rows, embeddings, threshold, merge=people == "merge")
    if people == "merge":
        rows = near_duplicates(rows)
    rows, split_facts = split_rows(rows, embeddings, split or settings_of(index.facts))
    facts = {**index.facts, "dedupe": {"people": people, "threshold": threshold}, "split": split_facts}
    return write_index(output, index.root, rows, embeddings, facts)


def settings_of(facts: Mapping[str, Any]) -> SplitSettings:
    """The settings by which an index was split."""
    names = ("share", "seed", "threshold")
    return SplitSettings(**{name: facts["split"][name] for name in names if name in facts.get("split", {})})


def same_bytes(rows: Sequence[Row]) -> list[Row]:
    """Mark every usable row whose bytes an earlier one has, whoever it shows."""
    first: dict[str, Row] = {}
    marked = []
    for row in rows:
        if row.status == OK and (kept := first.setdefault(row.sha256, row)) is not row:
            row = _duplicate(row, f"the same bytes as {kept.source}")
        marked.append(row)
    return marked


def near_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Mark every usable row that looks like an earlier photo of the same person."""
    kept: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    marked = []
    for row in rows:
        if row.status == OK and row.identity and row.phash:
            bits = int(row.phash, 16)
            twin = next(
                (other for seen, other in kept[row.identity] if (bits ^ seen).bit_count() <= NEAR), None
            )
            if twin is None:
                kept[row.identity].append((bits, row))
            else:
                row = _duplicate(row, f"looks like {twin.source}")
        marked.append(row)
    return marked


def same_people(rows: Sequence[Row], embeddings: Tensor, threshold: float, merge: bool) -> list[Row]:
    """Merge people who are one by their mean embeddings, or set the smaller ones aside. The largest keeps its name; among
    equals the first.
    """
    people = people_of(rows, embeddings, unknown=False)
    marked = list(rows)
    for group in clusters(people.means, threshold):
        keeper = max(group, key=lambda person: (len(people.rows[person]), -person))
        for person in group:
            if person == keeper:
                continue
            # In a chain of likenesses the keeper itself may be less like than the one in between.
            cosine = float(torch.dot(people.means[person], people.means[keeper]))
            for number in people.rows[person]:
                if merge:
                    marked[number] = replace(rows[number], identity=people.names[keeper])
                else:
                    reason = f"{people.names[person]} is {people.names[keeper]}, who has more photos or came first (cosine {cosine:.2f})"
                    marked[number] = _duplicate(rows[number], reason)
    return marked


def _duplicate(row: Row, reason: str) -> Row:
    return replace(row, status="duplicate", reason=reason, split="")
