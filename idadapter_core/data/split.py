"""Test people, chosen so that nobody of them is trained on: by what a recogniser says, not by the folder's name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .index import OK, Row
from .people import by_person

_BLOCK = 4096  # people compared at a time: 64 MiB of cosines


@dataclass(frozen=True)
class SplitSettings:
    """How test people are chosen."""

    share: float = 0.05  # of the usable photos
    seed: int = 0
    threshold: float = 0.6  # people whose mean embeddings have a higher cosine are taken for one

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"the share of test photos must be at least 0 and below 1, got {self.share}")
        if not -1 < self.threshold < 1:
            raise ConfigError(
                f"the cosine that makes two people one must be between -1 and 1, got {self.threshold}"
            )


@dataclass(frozen=True, eq=False)
class People:
    """Those whom the usable rows show: an identity each, or a photo where nobody said who it is."""

    names: tuple[str, ...]  # identity, or the source of the only photo
    rows: tuple[tuple[int, ...], ...]  # numbers of each one's rows
    means: Tensor  # (people, 512) unit length


def people_of(rows: Sequence[Row], embeddings: Tensor, unknown: bool = True) -> People:
    """The people of the usable rows, in the order of their first photo; `unknown`: with photos of nobody known."""
    found = list(by_person(row for row in rows if row.status == OK and (row.identity or unknown)).values())
    photos = tuple(tuple(row.number for row in person) for person in found)
    means = torch.zeros(len(found), embeddings.shape[1])
    for place, numbers in enumerate(photos):
        directions = torch.nn.functional.normalize(embeddings[list(numbers)].float(), dim=1)
        means[place] = torch.nn.functional.normalize(directions.mean(dim=0), dim=0)
    names = tuple(person[0].identity or person[0].source for person in found)
    return People(names, photos, means)


def clusters(means: Tensor, threshold: float) -> list[list[int]]:
    """People (P, 512), unit length, in groups that hang together by cosines above the threshold. Ordered by first member.

    A block of the matrix of cosines is made at a time, so memory grows with P, not with its square.
    """
    labels = torch.arange(len(means))
    for row, column, cosines in _blocks(means):
        close = cosines > threshold
        for place in close.any(dim=1).nonzero()[:, 0].tolist():
            joined = labels[column : column + close.shape[1]][close[place].cpu()]
            own = labels[row + place]
            if (joined != own).any():
                joined = torch.cat([joined, own[None]])
                labels[torch.isin(labels, joined)] = joined.min()
    groups: dict[int, list[int]] = {}
    for person, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(person)
    return list(groups.values())


def split_rows(
    rows: Sequence[Row], embeddings: Tensor, settings: SplitSettings
) -> tuple[list[Row], dict[str, Any]]:
    """Give every usable row its split, and facts for the index: settings, counts, and the largest cosine between the two sides.

    Whole clusters go to test, in an order by seed and name, until the share is reached; so one that is there stays there when
    photos are added. A cluster larger than the share is passed over where others suffice, and the last one always stays.
    """
    people = people_of(rows, embeddings)
    groups = clusters(people.means, settings.threshold)
    sizes = [sum(len(people.rows[person]) for person in group) for group in groups]
    wanted = settings.share * sum(sizes)

    def order(place: int) -> tuple[int, str]:
        name = min(people.names[person] for person in groups[place])
        too_large = sizes[place] if sizes[place] > wanted else 0
        return too_large, hashlib.sha256(
            f"{settings.seed}\x1f{name}".encode("utf-8", "surrogatepass")
        ).hexdigest()

    test: list[int] = []
    taken = 0
    for place in sorted(range(len(groups)), key=order)[:-1]:
        if taken >= wanted or (taken and sizes[place] > wanted):
            break
        test += groups[place]
        taken += sizes[place]
    train = sorted(set(range(len(people.names))) - set(test))
    in_test = {number for person in test for number in people.rows[person]}
    marked = [
        replace(row, split="" if row.status != OK else "test" if row.number in in_test else "train")
        for row in rows
    ]
    cosine = largest_cosine(people.means[train], people.means[sorted(test)])
    return marked, {
        "share": settings.share,
        "seed": settings.seed,
        "threshold": settings.threshold,
        "people": len(people.names),
        "clusters": len(groups),
        "test_people": len(test),
        "test_photos": taken,
        "largest_cosine": None if cosine is None else round(cosine, 4),
    }


def largest_cosine(first: Tensor, second: Tensor) -> float | None:
    """The largest cosine between the rows of two matrices of unit vectors; None where one is empty."""
    if not len(first) or not len(second):
        return None
    first, second = first.to(_device()), second.to(_device())
    return max(
        float((first[row : row + _BLOCK] @ second[column : column + _BLOCK].T).max())
        for row in range(0, len(first), _BLOCK)
        for column in range(0, len(second), _BLOCK)
    )


def _blocks(means: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First row, first column and values of each block of the matrix of cosines, up to its diagonal; nobody is like himself."""
    means = means.to(_device())
    for row in range(0, len(means), _BLOCK):
        for column in range(0, row + 1, _BLOCK):
            cosines = means[row : row + _BLOCK] @ means[column : column + _BLOCK].T
            if row == column:
                cosines.fill_diagonal_(-2)
            yield row, column, cosines


def _device() -> str:
    """Millions of people are compared in minutes on a GPU, in days without."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_split(facts: dict[str, Any]) -> str:
    """The split in words."""
    lines = [
        f"test: {facts['test_photos']} photos of {facts['test_people']} of {facts['people']} people "
        f"({facts['clusters']} clusters at cosine {facts['threshold']})"
    ]
    if facts["largest_cosine"] is not None:
        lines.append(
            f"largest cosine between a person in train and one in test: {facts['largest_cosine']:.3f}"
        )
    elif facts["share"] and facts["people"]:
        lines.append(
            "warning: no test photos: everybody hangs together in one cluster, or there is one person only"
        )
    return "\n".join(lines)
