"""Whom an evaluation draws, and from which photos."""

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
class Photo:
    """A real photo."""

    row: Row
    read: Callable[[], Image] = field(compare=False)  # (H, W, 3), RGB uint8, upright


@dataclass(frozen=True)
class Person:
    """Somebody to draw."""

    name: str
    class_word: str  # man, woman or person
    references: tuple[Photo, ...]
    other: Photo | None  # a photo that no adapter is shown, where there is one


def choose_people(
    index: Index, settings: PeopleConfig, has_face: Callable[[Photo], bool]
) -> tuple[Person, ...]:
    """The people of an index to draw, each with `settings.references` photos. Rows without an identity are a person each.

    Who and which photos is a function of the seed: asking for more people adds to those there were.

    Args:
        has_face: whether the judging models find the face in a photo; photos without are left out.

    Raises:
        ConfigError: nobody in that split has enough photos.
    """
    usable = index.usable(None if settings.split == "all" else settings.split)
    everyone = People(usable)
    numbers, is_known = usable.column("number"), usable.has_text("identity")
    firsts = everyone.firsts.tolist()
    known = {usable[first].identity: place for place, first in enumerate(firsts) if is_known[first]}
    rows = dict(known)  # by name, the person's place among all
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
        photos: list[Photo] = []
        for row in _shuffled(person, settings.seed, name):
            photo = Photo(row, partial(index.load, row))
            if has_face(photo):
                photos.append(photo)
            else:
                log.warning(
                    "%s: left out, the face package of the metrics recognises no face in it", row.source
                )
            if len(photos) > wanted:  # the references and one more
                break
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


def _shuffled(entries: Iterable[T], seed: int, what: str) -> list[T]:
    found = list(entries)
    return [
        found[i] for i in torch.randperm(len(found), generator=generator(seed, "evaluation", what)).tolist()
    ]
