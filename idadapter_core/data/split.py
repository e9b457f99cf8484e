"""Split off test people, so that none of them is trained on: judged by a recogniser, not by folder names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import ConfigError
from .people import People
from .rows import OK, SPLITS, STATUSES, Edited, Row, Rows, as_rows

_BLOCK = 4096  # people compared at a time; 64 MiB of cosines


@dataclass(frozen=True)
class SplitSettings:
    """Settings of the split into train and test."""

    share: float = 0.05  # of the usable photos
    seed: int = 0
    threshold: float = 0.6  # people whose mean embeddings have a higher cosine count as one

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"the share of test photos must be at least 0 and below 1, got {self.share}")
        if not -1 < self.threshold < 1:
            raise ConfigError(
                f"the cosine that makes two people one must be between -1 and 1, got {self.threshold}"
            )


@dataclass(frozen=True, eq=False)
class Faces:
    """The people in the usable rows: one per identity, or per photo of an unknown person."""

    people: People
    means: Tensor  # (people, 512) unit length

    def name(self, person: int) -> str:
        """The identity, or the source of the only photo."""
        row = self.people[person][0]
        return row.identity or row.source


def faces_of(rows: Rows, embeddings: Tensor, unknown: bool = True) -> Faces:
    """The people of the usable rows, in the order of their first photo; `unknown`: include photos of unknown people.

    Args:
        embeddings: (all rows, 512) of the rows' index.
    """
    chosen = rows.status == STATUSES.index(OK)
    people = People(rows.where(chosen if unknown else chosen & rows.has_text("identity")))
    places = people.rows.places.astype(np.int64)
    means = torch.zeros(len(people), embeddings.shape[1])
    sizes = people.sizes
    alone = np.flatnonzero(sizes == 1)
    firsts = people.firsts[alone]
    for start in range(0, len(alone), _BLOCK):
        chosen_places = torch.from_numpy(places[firsts[start : start + _BLOCK]])
        directions = normalize(embeddings[chosen_places].float(), dim=1)
        means[torch.from_numpy(alone[start : start + _BLOCK])] = normalize(directions, dim=1)
    for person in np.flatnonzero(sizes > 1).tolist():
        directions = normalize(embeddings[torch.from_numpy(places[people.positions(person)])].float(), dim=1)
        means[person] = normalize(directions.mean(dim=0), dim=0)
    return Faces(people, means)


def clusters(means: Tensor, threshold: float) -> list[list[int]]:
    """Group people (P, 512), unit length, that are connected by cosines above the threshold. Ordered by first member.

    The matrix of cosines is computed in blocks, so memory grows with P, not with P squared.
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
) -> tuple[Rows, dict[str, Any]]:
    """Assign every usable row to a split; also returns facts for the index: settings, counts, largest cosine between the splits.

    Whole clusters go to test, in an order given by seed and name, until the share is reached; a cluster stays in test when photos are
    added. A cluster larger than the share is skipped if others suffice, and the last one always stays in train.

    Args:
        rows: all rows of an index.
    """
    given = as_rows(rows)
    faces = faces_of(given, embeddings)
    photos = faces.people.sizes
    groups = clusters(faces.means, settings.threshold)
    sizes = [int(photos[group].sum()) for group in groups]
    wanted = settings.share * sum(sizes)

    def order(place: int) -> tuple[int, str]:
        name = min(faces.name(person) for person in groups[place])
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
    in_test = np.zeros(len(faces.people), bool)
    in_test[test] = True
    edited = Edited.of(given)
    edited.split[:] = SPLITS.index("")
    places, whose = faces.people.rows.places, faces.people.of
    edited.split[places] = np.where(in_test[whose], SPLITS.index("test"), SPLITS.index("train"))
    cosine = largest_cosine(faces.means[torch.from_numpy(~in_test)], faces.means[torch.from_numpy(in_test)])
    return Rows(edited), {
        "share": settings.share,
        "seed": settings.seed,
        "threshold": settings.threshold,
        "people": len(faces.people),
        "clusters": len(groups),
        "test_people": len(test),
        "test_photos": taken,
        "largest_cosine": None if cosine is None else round(cosine, 4),
    }


def largest_cosine(first: Tensor, second: Tensor) -> float | None:
    """Largest cosine between the rows of two matrices of unit vectors; None if one is empty."""
    if not len(first) or not len(second):
        return None
    first, second = first.to(_device()), second.to(_device())
    return max(
        float((first[row : row + _BLOCK] @ second[column : column + _BLOCK].T).max())
        for row in range(0, len(first), _BLOCK)
        for column in range(0, len(second), _BLOCK)
    )


def _blocks(means: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of the matrix of cosines up to its diagonal, as (first row, first column, values), without self-similarity."""
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
    """Describe the split in words."""
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
