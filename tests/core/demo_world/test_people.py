"""Who people are: seeds, groups, and what a person has."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from idadapter_core.demo_world import SEXES, SPLITS, Person, seed_of, split_of
from idadapter_core.demo_world.identity import (
    BEARDS,
    EYE_COLORS,
    HAIR_COLORS,
    HAIR_STYLES,
    MAX_SEED,
    trait_names,
)
from idadapter_core.errors import InputError


def test_the_same_seed_is_the_same_person_and_another_one_is_not() -> None:
    assert Person.sample(7) == Person.sample(7)
    assert hash(Person.sample(7)) == hash(Person.sample(np.int64(7)))  # type: ignore[arg-type]
    people = {Person.sample(seed).shape for seed in range(50)}
    assert len(people) == 50


def test_groups_never_share_a_seed_and_leave_none_out() -> None:
    drawn = {name: {seed_of(name, index) for index in range(200)} for name in SPLITS}
    assert all(len(seeds) == 200 for seeds in drawn.values())
    for first, second in combinations(drawn.values(), 2):
        assert not first & second
    for name, seeds in drawn.items():
        assert {split_of(seed) for seed in seeds} == {name}
    assert {split_of(seed) for seed in range(10)} == set(SPLITS)


def test_people_vary_and_stay_within_their_ranges() -> None:
    people = [Person.sample(seed) for seed in range(300)]
    assert {person.sex for person in people} == set(SEXES)
    assert {person.look.hair.style for person in people} == set(HAIR_STYLES)
    assert {person.look.beard for person in people} == set(BEARDS)
    assert {person.look.eyes for person in people} == set(EYE_COLORS)
    assert {person.look.hair.color_name for person in people} <= set(HAIR_COLORS)
    for person in people:
        assert len(person.shape) == len(trait_names())
        assert max(map(abs, person.shape)) < 1.6
        assert 19 <= person.age <= 69
        assert sum(person.ancestry) == pytest.approx(1)
        assert all(0 <= value <= 1 for value in person.look.hair.color)
        assert person.sex == "man" or person.look.beard == "none"


def test_skin_is_no_stand_in_for_ancestry() -> None:
    people = [Person.sample(seed) for seed in range(400)]
    for origin in range(3):
        tones = [person.look.tone for person in people if person.ancestry[origin] > 0.6]
        assert len(tones) > 20
        assert max(tones) - min(tones) > 2


def test_few_heads_are_gray() -> None:
    people = [Person.sample(seed) for seed in range(400)]
    gray = [
        p
        for p in people
        if max(p.look.hair.color) - min(p.look.hair.color) < 0.04 and max(p.look.hair.color) > 0.3
    ]
    assert len(gray) < 0.1 * len(people)


def test_an_impostor_by_shape_takes_the_look_alone() -> None:
    women = [person for person in map(Person.sample, range(20)) if person.sex == "woman"]
    man = next(person for person in map(Person.sample, range(20)) if person.sex == "man")
    one, other = women[:2]
    impostor = one.with_look_of(other)
    assert impostor.look == other.look != one.look
    assert (impostor.shape, impostor.ancestry, impostor.age) == (one.shape, one.ancestry, one.age)
    with pytest.raises(
        InputError, match="a woman cannot take the look of a man; choose two people of the same sex"
    ):
        one.with_look_of(man)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.5, "1", True])
def test_a_seed_that_cannot_be_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match="seed of a person must be a whole number"):
        Person.sample(seed)  # type: ignore[arg-type]


def test_groups_and_indices_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        InputError,
        match="no group of people 'exam'; choose one of: training, second_training, validation, test",
    ):
        seed_of("exam", 0)
    with pytest.raises(InputError, match="counted from 0, got -1"):
        seed_of("test", -1)


def test_people_who_cannot_be_drawn_are_refused() -> None:
    person = Person.sample(0)
    with pytest.raises(InputError, match="no hair style 'mohawk'; choose one of: bald, buzz"):
        replace(person.look.hair, style="mohawk")
    with pytest.raises(InputError, match="no colour of eyes 'red'"):
        replace(person.look, eyes="red")
    with pytest.raises(InputError, match="no beard 'forked'"):
        replace(person.look, beard="forked")
    with pytest.raises(
        InputError, match=r"the shape of a person has 116 values, got 1; start from Person\.sample"
    ):
        replace(person, shape=(0.0,))
