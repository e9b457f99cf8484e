"""Captions of pictures in varied wording, and their vocabulary."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..errors import InputError
from .factors import Factors
from .identity import Person

SEED_TAG = 1_209  # separates this random stream, as in identity.py
FACTORS = ("style", "expression", "direction", "clothes", "accessory", "background")

# Phrases of each class: "{noun}" stands for the person, "{color}" for the colour of the clothes. No phrase fits two classes.
STYLE_WORDS: Mapping[str, Sequence[str]] = {
    "photo": ("a photo of {noun}", "a portrait photo of {noun}", "a photograph of {noun}"),
    "sketch": ("a pencil sketch of {noun}", "a pencil drawing of {noun}", "a sketch of {noun}"),
    "oil": ("an oil painting of {noun}", "a painted portrait of {noun}, oil on canvas"),
    "comic": ("a comic book drawing of {noun}", "{noun}, comic style", "a comic panel of {noun}"),
    "night": ("a moonlit photo of {noun}", "{noun} by moonlight", "a picture of {noun} in blue moonlight"),
}
EXPRESSION_WORDS: Mapping[str, Sequence[str]] = {
    "neutral": ("with a neutral expression", "with a calm face", "looking relaxed"),
    "smiling": ("smiling", "with a smile", "with a friendly smile"),
    "laughing": ("laughing", "laughing out loud", "laughing with an open mouth"),
    "sad": ("looking sad", "with a sad face", "sad"),
    "angry": ("looking angry", "with an angry face", "angry"),
    "surprised": ("looking surprised", "with a surprised face", "surprised"),
    "eyes_closed": ("with closed eyes", "with eyes closed", "eyes closed"),
}
DIRECTION_WORDS: Mapping[str, Sequence[str]] = {
    "left": ("facing left", "turned to the left", "head turned left"),
    "ahead": ("facing the camera", "facing forward", "seen from the front"),
    "right": ("facing right", "turned to the right", "head turned right"),
}
ACCESSORY_WORDS: Mapping[str, Sequence[str]] = {
    "none": ("",),
    "glasses": ("with glasses", "wearing glasses"),
    "sunglasses": ("with sunglasses", "wearing sunglasses"),
    "beanie": ("with a beanie", "wearing a knitted beanie", "in a woolen beanie"),
    "cap": ("with a cap", "wearing a baseball cap", "in a cap"),
    "scarf": ("with a scarf", "wearing a scarf", "with a warm scarf"),
}
CLOTHES_WORDS: Sequence[str] = (
    "in {a_color} shirt",
    "wearing {a_color} shirt",
    "in {a_color} top",
    "dressed in {color}",
)
BACKGROUND_WORDS: Mapping[str, Sequence[str]] = {
    "studio": ("in a studio", "against a plain studio background", "plain studio background"),
    "snow": ("in the snow", "in a snowy landscape", "on a snowy day"),
    "beach": ("at the beach", "on a beach", "on a sunny beach"),
    "forest": ("in a forest", "in the woods", "among forest trees"),
    "city_night": ("in a city at night", "before city lights", "with the lights of a city behind"),
    "brick": ("before a brick wall", "in front of a brick wall", "brick wall behind"),
    "bookshelf": ("before a bookshelf", "in front of bookshelves", "in a library full of books"),
    "sunset": ("at sunset", "in front of a sunset", "with a sunset behind"),
}

# Phrases that begin with one of these words may follow without a comma if the text has no comma yet.
LINKS = (
    "with", "in", "at", "on", "before", "against", "among", "wearing", "dressed", "looking", "facing", "turned", "smiling", "laughing",
)  # fmt: skip


def caption(
    person: Person,
    factors: Factors,
    *,
    mention: Collection[str] = FACTORS,
    word: str | None = None,
    wording: int | None = None,
) -> str:
    """Return a caption that names the person and each factor once.

    Args:
        mention: the factors to name, of `FACTORS`. Without "style" the caption begins with "a picture of". The accessory "none" has no words.
        word: identity word to put before the noun, such as "sks".
        wording: seed of the choice of phrases and their order; None: the factors' own seed.

    Raises:
        InputError: `mention` has an unknown factor.
    """
    if unknown := set(mention) - set(FACTORS):
        raise InputError(
            f"captions have no factor {sorted(unknown)[0]!r}; choose from: {', '.join(FACTORS)}."
        )
    rng = np.random.default_rng([SEED_TAG, factors.seed if wording is None else wording])
    parts = {name: _pick(rng, words) for name, words in _alternatives(factors).items()}
    order = rng.random(len(FACTORS) - 1)
    style = parts.pop("style")
    if "style" not in mention:
        style = "a picture of {noun}"
    noun = _with_article(f"{word} {person.sex}" if word else person.sex)
    ordered = [name for _, name in sorted(zip(order, parts, strict=True))]
    phrases = [parts[name] for name in ordered if name in mention and parts[name]]
    text = style.format(noun=noun)
    for phrase in phrases:
        flows = phrase.split()[0] in LINKS and "," not in text and rng.random() < 0.6
        text += f" {phrase}" if flows else f", {phrase}"
    return text


def words_of(factor: str, value: str) -> tuple[str, ...]:
    """Return all phrases with which a caption may name a class of a factor."""
    table: Mapping[str, Sequence[str]] = {
        "style": STYLE_WORDS, "expression": EXPRESSION_WORDS, "direction": DIRECTION_WORDS, "accessory": ACCESSORY_WORDS,
        "background": BACKGROUND_WORDS,
    }.get(factor, {})  # fmt: skip
    if factor == "clothes":
        return tuple(phrase.format(color=value, a_color=_with_article(value)) for phrase in CLOTHES_WORDS)
    return tuple(table[value])


def vocabulary() -> tuple[str, ...]:
    """Return all words of captions, sorted."""
    from .factors import CLOTHES
    from .identity import SEXES

    tables = (STYLE_WORDS, EXPRESSION_WORDS, DIRECTION_WORDS, ACCESSORY_WORDS, BACKGROUND_WORDS)
    phrases = [phrase for table in tables for words in table.values() for phrase in words]
    phrases += [*CLOTHES_WORDS, *CLOTHES, *SEXES, "a picture of"]
    text = " ".join([*phrases, *map(_with_article, CLOTHES)])
    for slot in ("{noun}", "{color}", "{a_color}"):
        text = text.replace(slot, "")
    return tuple(sorted(set(re.findall(r"[a-z]+", text))))


def _alternatives(factors: Factors) -> dict[str, Sequence[str]]:
    return {
        name: words_of(name, factors.direction if name == "direction" else getattr(factors, name))
        for name in FACTORS
    }


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.random() * len(words))]
