"""The prompts of a measurement, the classes that they name, and the factors that may leak from a reference photo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...placeholders import CLASS_WORD


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the class of each factor that it names."""

    text: str
    classes: dict[str, str]

    def about(self, sex: str) -> str:
        """The text for a woman or man, without an adapter's identity word."""
        return self.text.replace(CLASS_WORD, sex)

    @property
    def silent(self) -> tuple[str, ...]:
        """Factors that the prompt does not name, and a reference photo could bring along."""
        return tuple(name for name in LEAKING if name not in self.classes)


def followed(named: Mapping[str, str], read: Mapping[str, str]) -> float:
    """Share of the named classes that the reader reads in a picture."""
    return sum(read[factor] == value for factor, value in named.items()) / len(named)


LEAKING = ("expression", "direction", "background", "accessory")

PROMPTS = (
    Prompt(f"a photo of a {CLASS_WORD}", {"style": "photo"}),
    Prompt(
        f"a photo of a {CLASS_WORD} smiling at the beach",
        {"style": "photo", "expression": "smiling", "background": "beach"},
    ),
    Prompt(
        f"a photo of a {CLASS_WORD} facing left, looking sad, in a forest",
        {"style": "photo", "direction": "left", "expression": "sad", "background": "forest"},
    ),
    Prompt(
        f"a photo of a {CLASS_WORD} wearing sunglasses, facing right, in a city at night",
        {"style": "photo", "accessory": "sunglasses", "direction": "right", "background": "city_night"},
    ),
    Prompt(
        f"a photo of a {CLASS_WORD} with a surprised face, in a red shirt, before a brick wall",
        {"style": "photo", "expression": "surprised", "clothes": "red", "background": "brick"},
    ),
    Prompt(
        f"a photo of a {CLASS_WORD} wearing a knitted beanie in the snow, facing the camera",
        {"style": "photo", "accessory": "beanie", "background": "snow", "direction": "ahead"},
    ),
    Prompt(
        f"an oil painting of a {CLASS_WORD} laughing, in a blue shirt",
        {"style": "oil", "expression": "laughing", "clothes": "blue"},
    ),
    Prompt(
        f"a pencil sketch of a {CLASS_WORD} facing left, with glasses",
        {"style": "sketch", "direction": "left", "accessory": "glasses"},
    ),
    Prompt(
        f"a comic book drawing of a {CLASS_WORD} looking angry, in a library full of books",
        {"style": "comic", "expression": "angry", "background": "bookshelf"},
    ),
    Prompt(
        f"a moonlit photo of a {CLASS_WORD} with a scarf, turned to the right",
        {"style": "night", "accessory": "scarf", "direction": "right"},
    ),
    Prompt(
        f"a photo of a {CLASS_WORD} with eyes closed at sunset, in a white shirt",
        {"style": "photo", "expression": "eyes_closed", "background": "sunset", "clothes": "white"},
    ),
    Prompt(
        f"an oil painting of a {CLASS_WORD} wearing a baseball cap, facing right, in a studio",
        {"style": "oil", "accessory": "cap", "direction": "right", "background": "studio"},
    ),
)
