"""What an index holds, in words: the first thing to read after a scan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from .index import OK, Index, Row
from .inventory import describe_inventory
from .people import by_person, photos_beside_target
from .split import describe_split

EXAMPLES = 10
"""Photos named of each status that is not ok."""
_PER_PERSON = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 10**9))
_SIDES = ((0, 255), (256, 511), (512, 767), (768, 1023), (1024, 10**9))


def describe(index: Index, references: int = 4) -> str:
    """Counts, examples of what was refused, and what there is to train on with N references of a person."""
    usable = index.usable()
    parts = [
        _statuses(index),
        describe_inventory(index.facts.get("files", {})),
        "\n".join(index.facts.get("notes", ())),
        bad_photos(index),
        _people(usable),
        _bins("shorter side, px", (min(row.width, row.height) for row in usable), _SIDES),
        _shares("class noun", Counter(row.class_noun for row in usable)),
        f"captions: {sum(bool(row.caption) for row in usable)} of {len(usable)} usable photos have one",
        describe_split(dict(index.facts["split"])) if "split" in index.facts else "",
        synthetic_references(usable, references),
    ]
    return "\n\n".join(part for part in parts if part)


def bad_photos(index: Index) -> str:
    """The first photos of each status but ok, with the reasons."""
    blocks = []
    for status, count in index.counts().items():
        if status != OK and count:
            examples = [row for row in index.rows if row.status == status][:EXAMPLES]
            lines = [f"{status} ({count}):", *(f"  {row.source}: {row.reason}" for row in examples)]
            blocks.append("\n".join(lines + ["  ..."] * (count > EXAMPLES)))
    return "\n".join(blocks)


def synthetic_references(usable: Iterable[Row], references: int) -> str:
    """How many of N references training makes from others (flipped, turned, recoloured), for want of photos beside the target."""
    photos = [len(person) for person in by_person(usable).values()]
    missing = [(count, max(references - photos_beside_target(count), 0)) for count in photos]
    short = sum(count for count, lacking in missing if lacking)
    made = sum(count * lacking for count, lacking in missing)
    share = made / (sum(photos) * references) if photos else 0.0
    return (
        f"with {references} references beside the photo to learn: {short} of {sum(photos)} usable photos are of people with too few; "
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


def _people(usable: list[Row]) -> str:
    photos = Counter(row.identity for row in usable if row.identity)
    unknown = sum(not row.identity for row in usable)
    head = (
        f"people: {len(photos)} with {sum(photos.values())} usable photos; {unknown} photos of nobody known"
    )
    return f"{head}\n{_bins('photos of a person', photos.values(), _PER_PERSON)}" if photos else head


def _bins(title: str, values: Iterable[int], ranges: Iterable[tuple[int, int]]) -> str:
    listed = list(values)
    counts: dict[str, int] = {}
    for low, high in ranges:
        name = str(low) if low == high else f"{low} and more" if high == 10**9 else f"{low} to {high}"
        counts[name] = sum(low <= value <= high for value in listed)
    return _shares(title, counts)


def _shares(title: str, counts: Mapping[str, int]) -> str:
    total = max(sum(counts.values()), 1)
    return "\n".join(
        [
            f"{title}:",
            *(f"  {name:<13}{count:>9}  {count / total:6.1%}" for name, count in counts.items() if count),
        ]
    )
