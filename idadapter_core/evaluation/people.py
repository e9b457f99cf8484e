"""Choose the people of an evaluation and their photos."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from ..data.index import Index
from ..data.people import People
from ..data.rows import Row
from ..errors import ConfigError
from ..faces.images import Image
from ..randomness import generator
from .config import PeopleConfig

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RealPhoto:
    """A real photo."""

    row: Row
    read: Callable[[], Image] = field(compare=False)  # (H, W, 3), RGB uint8, upright


@dataclass(frozen=True)
class Person:
    """A person to generate."""

    name: str
    class_word: str  # man, woman or person
    references: tuple[RealPhoto, ...]
    other: RealPhoto | None  # a photo that no adapter receives, if there is one


def choose_people(
    index: Index, settings: PeopleConfig, has_face: Callable[[RealPhoto], bool]
) -> tuple[Person, ...]:
    """Choose people from an index, each with `settings.references` photos. A row without identity is a person of its own.

    People and photos depend on the seed only: requesting more people keeps the earlier ones.

    Args:
        has_face: whether the evaluation models find the face in a photo; other photos are skipped.

    Raises:
        ConfigError: nobody in that split has enough photos.
    """
    usable = index.usable(None if settings.split == "all" else settings.split)
    everyone = People(usable)
    numbers, is_known = usable.column("number"), usable.has_text("identity")
    firsts = everyone.firsts.tolist()
    known = {usable[first].identity: place for place, first in enumerate(firsts) if is_known[first]}
    rows = dict(known)  # by name: the person's position among all
    for place, first in enumerate(firsts):
        if not is_known[first]:
            unknown = f"row {numbers[first]}"
            rows[unknown if unknown not in known else f"{unknown} of nobody known"] = place
    people: list[Person] = []
    for name in _shuffled(sorted(rows), settings.seed, "people"):
        wanted = settings.references
        person = everyone[rows[name]]
        if len(person) < wanted:
            continue
        shuffled = [
            RealPhoto(row, partial(index.load, row)) for row in _shuffled(person, settings.seed, name)
        ]
        photos = _with_face(shuffled, has_face, wanted + 1)  # the references and one more
        if len(photos) < wanted:
            continue
        word, _ = Counter(row.class_noun or "person" for row in person).most_common(1)[0]
        people.append(
            Person(name, word, tuple(photos[:wanted]), photos[wanted] if len(photos) > wanted else None)
        )
        if len(people) == settings.identities:
            break
    if not people:
        raise ConfigError(
            f"nobody of {len(rows)} people in the split {settings.split!r} of {settings.index} has {settings.references} photos with a "
            "face; lower data.references, or choose another data.split"
        )
    if len(people) < settings.identities:
        log.warning(
            "only %d people have %d photos; data.identities asks for %d",
            len(people),
            settings.references,
            settings.identities,
        )
    return tuple(people)


def _with_face(
    photos: Iterable[RealPhoto], has_face: Callable[[RealPhoto], bool], count: int
) -> list[RealPhoto]:
    """The first photos, up to `count`, in which the evaluation models find the face."""
    found: list[RealPhoto] = []
    for photo in photos:
        if has_face(photo):
            found.append(photo)
        else:
            log.warning(
                "%s: left out, the face package of the metrics recognises no face in it", photo.row.source
            )
        if len(found) == count:
            break
    return found


def _shuffled(entries: Iterable[T], seed: int, what: str) -> list[T]:
    found = list(entries)
    return [
        found[i] for i in torch.randperm(len(found), generator=generator(seed, "evaluation", what)).tolist()
    ]
