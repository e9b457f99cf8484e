"""Describe an index in words: the first thing to read after a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import Index
from .inventory import describe_inventory
from .people import People, photos_beside_target
from .rows import CLASS_NOUNS, OK, STATUSES, Rows
from .split import describe_split

EXAMPLES = 10
"""Number of example photos per status other than ok."""
_PER_PERSON = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 10**9))
_SIDES = ((0, 255), (256, 511), (512, 767), (768, 1023), (1024, 10**9))


def describe(index: Index, references: int = 4) -> str:
    """Describe counts, examples of rejected photos, and the training data with N references per person."""
    usable = index.usable()
    captions = int(usable.has_text("caption").sum())
    parts = [
        _statuses(index),
        describe_inventory(index.facts.get("files", {})),
        "\n".join(index.facts.get("notes", ())),
        bad_photos(index),
        _people(usable),
        _bins("shorter side, px", np.minimum(usable.column("width"), usable.column("height")), _SIDES),
        _shares("class noun", _counts(usable.column("class_noun"))),
        f"captions: {captions} of {len(usable)} usable photos have one",
        describe_split(dict(index.facts["split"])) if "split" in index.facts else "",
        synthetic_references(usable, references),
    ]
    return "\n\n".join(part for part in parts if part)


def bad_photos(index: Index) -> str:
    """The first photos of each status other than ok, with the reasons."""
    blocks = []
    for status, count in index.counts().items():
        if status != OK and count:
            examples = index.rows.where(index.rows.status == STATUSES.index(status))[:EXAMPLES]
            lines = [f"{status} ({count}):", *(f"  {row.source}: {row.reason}" for row in examples)]
            blocks.append("\n".join(lines + ["  ..."] * (count > EXAMPLES)))
    return "\n".join(blocks)


def synthetic_references(usable: Rows, references: int) -> str:
    """Describe how many of N references are synthetic (flipped, rotated, recoloured), because a person has too few photos."""
    sizes, people = np.unique(People(usable).sizes, return_counts=True)
    short = made = 0
    for photos, count in zip(sizes.tolist(), people.tolist(), strict=True):
        lacking = max(references - photos_beside_target(photos), 0)
        short += photos * count * bool(lacking)
        made += photos * count * lacking
    share = made / (len(usable) * references) if len(usable) else 0.0
    return (
        f"with {references} references beside the photo to learn: {short} of {len(usable)} usable photos are of people with too few; "
        f"{made} references ({share:.1%}) are made from others (flipped, turned, recoloured)"
    )


def _statuses(index: Index) -> str:
    total = len(index.rows)
    lines = [f"{total} photos, {index.bad_share():.1%} of them unusable"]
    lines += [
        f"  {status:<13}{count:>9}  {count / max(total, 1):6.1%}"
        for status, count in index.counts().items()
        if count or status == OK
    ]
    return "\n".join(lines)


def _people(usable: Rows) -> str:
    has_name = usable.has_text("identity")
    photos = People(usable.where(has_name)).sizes
    unknown = len(usable) - int(has_name.sum())
    head = f"people: {len(photos)} with {photos.sum()} usable photos; {unknown} photos of nobody known"
    return f"{head}\n{_bins('photos of a person', photos, _PER_PERSON)}" if len(photos) else head


def _counts(nouns: NDArray[np.uint8]) -> dict[str, int]:
    """Number of rows per noun, in the order of appearance."""
    found, first, counts = np.unique(nouns, return_index=True, return_counts=True)
    return {CLASS_NOUNS[found[place]]: int(counts[place]) for place in np.argsort(first)}


def _bins(title: str, values: NDArray[Any], ranges: Iterable[tuple[int, int]]) -> str:
    counts: dict[str, int] = {}
    for low, high in ranges:
        name = str(low) if low == high else f"{low} and more" if high == 10**9 else f"{low} to {high}"
        counts[name] = int(((values >= low) & (values <= high)).sum())
    return _shares(title, counts)


def _shares(title: str, counts: Mapping[str, int]) -> str:
    total = max(sum(counts.values()), 1)
    return "\n".join(
        [
            f"{title}:",
            *(f"  {name:<13}{count:>9}  {count / total:6.1%}" for name, count in counts.items() if count),
        ]
    )
