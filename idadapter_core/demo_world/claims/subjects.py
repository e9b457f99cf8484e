"""The people of a measurement: reference photos, other photos to compare with, and impostors of the same look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import Factors, Person, render, seed_of
from ..portraits import reference_factors
from ..world import SIZE

SEED_TAG = 1_215
FIRST = 100_000  # number of the first person among those of the group "test", far from those that networks are measured on
REFERENCES, OTHERS = 4, 4  # photos of each person: to give to an adapter, and to compare with

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Subject:
    """A person of a measurement, with known photos."""

    name: str
    person: Person
    references: Pixels  # (REFERENCES, H, W, 3)
    reference_factors: tuple[Factors, ...]
    others: Pixels  # (OTHERS, H, W, 3) photos that no adapter gets
    other_landmarks: npt.NDArray[np.float32]  # (OTHERS, 5, 2)
    impostor: Pixels  # (OTHERS, H, W, 3) the same photos of another person of the same sex and look
    impostor_landmarks: npt.NDArray[np.float32]


def make_subjects(count: int, first: int = FIRST) -> list[Subject]:
    """Draw people whom no network was trained on. A subject does not depend on the number of subjects."""
    return [_subject(first + number) for number in range(count)]


def _subject(number: int) -> Subject:
    person = Person.sample(seed_of("test", number))
    rng = np.random.default_rng([SEED_TAG, number])
    shown = [reference_factors(rng) for _ in range(REFERENCES)]
    plain = [Factors.sample(rng, style="photo", accessory="none") for _ in range(OTHERS)]
    impostor = _other_of(person, number).with_look_of(person)
    people = [person] * (REFERENCES + OTHERS) + [impostor] * OTHERS
    drawn = render(people, [*shown, *plain, *plain], SIZE)
    parts = [slice(0, REFERENCES), slice(REFERENCES, REFERENCES + OTHERS), slice(REFERENCES + OTHERS, None)]
    references, others, impostors = (drawn.pixels[part] for part in parts)
    return Subject(
        f"{number}",
        person,
        references,
        tuple(shown),
        others,
        drawn.landmarks[parts[1]],
        impostors,
        drawn.landmarks[parts[2]],
    )


def _other_of(person: Person, number: int) -> Person:
    """Return another person of the same sex, who is no subject."""
    candidate = number + 10_000_000
    while True:
        other = Person.sample(seed_of("test", candidate))
        if other.sex == person.sex:
            return other
        candidate += 1


def true_pictures(subject: Subject, asked: Sequence[Factors]) -> Pixels:
    """Render the person with the factors of prompts (N, H, W, 3): the best that a method could draw."""
    return render([subject.person] * len(asked), list(asked), SIZE).pixels


def asked_factors(classes: dict[str, str], seed: int) -> Factors:
    """Factors with the classes that a prompt names; the others are drawn from `seed`, as the base model's are from its noise."""
    rng = np.random.default_rng([SEED_TAG, seed])
    return Factors.sample(rng, **classes)
