"""What changes from picture to picture, and how it is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from idadapter_core.demo_world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLOTHES,
    DIRECTIONS,
    EXPRESSIONS,
    FACTORS,
    STYLES,
    Factors,
    Person,
    caption,
)
from idadapter_core.demo_world.captions import vocabulary, words_of
from idadapter_core.errors import InputError

from .conftest import plain

CLASSES = {
    "style": STYLES,
    "expression": tuple(EXPRESSIONS),
    "direction": DIRECTIONS,
    "clothes": tuple(CLOTHES),
    "accessory": ACCESSORIES,
    "background": BACKGROUNDS,
}


def many(count: int = 150) -> list[Factors]:
    rng = np.random.default_rng(0)
    return [Factors.sample(rng) for _ in range(count)]


def test_sampling_repeats_and_meets_every_class() -> None:
    assert many() == many()
    for name, classes in CLASSES.items():
        assert {getattr(factors, name) for factors in many()} == set(classes)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_given_class_is_kept_and_moves_nothing_else(name: str) -> None:
    for value in CLASSES[name]:
        given = Factors.sample(np.random.default_rng(3), **{name: value})
        drawn = Factors.sample(np.random.default_rng(3))
        assert getattr(given, name) == value
        moved = {"direction": "yaw"}.get(name, name)
        # The light suits the background, so it follows a given one.
        light = given.light if name == "background" else drawn.light
        assert replace(given, **{moved: getattr(drawn, moved)}) == replace(drawn, light=light)


def test_yaw_and_direction_agree() -> None:
    for factors in many():
        assert factors.direction == (
            "left" if factors.yaw < -13 else "right" if factors.yaw > 13 else "ahead"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "fresco"}, "no style 'fresco'; choose one of: photo, sketch, oil, comic, night"),
        ({"background": "moon"}, "no background 'moon'"),
        ({"accessory": "crown"}, "no accessory 'crown'"),
        ({"clothes": "plaid"}, "no colour of clothes 'plaid'"),
        ({"collar": "lace"}, "no collar 'lace'"),
        ({"expression": "bored"}, "no expression 'bored'"),
        ({"yaw": 90.0}, "yaw must lie within ±45 degrees, got 90"),
        ({"roll": float("nan")}, "roll must lie within ±25 degrees, got nan"),
        ({"zoom": 3.0}, "zoom must lie within 0.5..1.5, got 3"),
    ],
)
def test_factors_that_cannot_be_drawn_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain(**change)


def test_a_given_class_that_does_not_exist_is_refused() -> None:
    for name in CLASSES:
        with pytest.raises(InputError, match="'unheard of'; choose one of: "):
            Factors.sample(np.random.default_rng(0), **{name: "unheard of"})


def said(text: str, factor: str, value: str) -> int:
    """How often a caption names a class, by the longest phrase at each place."""
    padded = f" {text.replace(',', ' ')} ".replace("  ", " ")
    phrases = [words.replace("{noun}", "").replace(",", " ").strip() for words in words_of(factor, value)]
    found: set[tuple[int, int]] = set()
    for phrase in sorted(filter(None, phrases), key=len, reverse=True):
        at = padded.find(f" {phrase} ")
        while at >= 0:
            if not any(start <= at < end for start, end in found):
                found.add((at, at + len(phrase)))
            at = padded.find(f" {phrase} ", at + 1)
    return len(found)


def test_captions_name_each_factor_once_and_no_other_class(person: Person) -> None:
    for factors in many():
        text = caption(person, factors)
        assert text.count(person.sex) == 1
        for name, classes in CLASSES.items():
            if name == "style":
                continue  # its words stand around the noun: see below
            for value in classes:
                there = getattr(factors, name) == value and value != "none"
                assert said(text, name, value) == there, (text, name, value)
        styles = [
            style
            for style in STYLES
            if any(
                text.startswith(words.format(noun=f"a {person.sex}")) for words in words_of("style", style)
            )
        ]
        assert styles == [factors.style], text


def test_captions_say_the_same_in_other_words(person: Person) -> None:
    texts = {caption(person, plain(expression="sad", accessory="scarf"), wording=seed) for seed in range(40)}
    assert len(texts) > 30
    assert caption(person, plain()) == caption(person, plain())


def test_captions_may_be_silent_and_may_hold_an_identity_word(person: Person) -> None:
    factors = plain(accessory="cap")
    assert caption(person, factors, mention=()) == f"a picture of a {person.sex}"
    assert caption(person, factors, mention=(), word="sks") == f"a picture of a sks {person.sex}"
    for name in FACTORS[1:]:
        text = caption(person, factors, mention=(name,))
        assert said(text, name, getattr(factors, name)) == 1
        assert sum(said(text, other, getattr(factors, other)) for other in FACTORS[1:]) == 1
    for seed in range(20):
        assert f"a sks {person.sex}" in caption(person, factors, word="sks", wording=seed)
    with pytest.raises(InputError, match="no factor 'hair'; choose from: style, expression"):
        caption(person, factors, mention=("hair",))


def test_the_vocabulary_is_all_that_captions_use(person: Person) -> None:
    words = set(vocabulary())
    for factors in many():
        assert set(caption(person, factors).replace(",", " ").split()) <= words


def test_articles_suit_their_nouns(person: Person) -> None:
    texts = {caption(person, plain(clothes="orange"), wording=seed) for seed in range(30)}
    assert any("an orange" in text for text in texts)
    assert not any("a orange" in text for text in texts)
    assert caption(person, plain(), mention=(), word="ohwx") == f"a picture of an ohwx {person.sex}"
