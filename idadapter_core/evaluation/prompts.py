"""Evaluation prompts in groups, each with the attribute that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..placeholders import CLASS_WORD

EXPRESSION, POSE = "expression", "pose"  # the groups whose attribute is measured
POSES = ("front", "side", "left", "right", "up", "down")  # left and right as seen in the image

# Names of the same expression in the label lists of published classifiers.
_EXPRESSION_NAMES = {
    "anger": ("angry",),
    "contempt": ("contemptuous",),
    "disgust": ("disgusted",),
    "fear": ("fearful", "afraid", "scared"),
    "happiness": ("happy", "joy", "smile", "smiling"),
    "neutral": ("calm", "none"),
    "sadness": ("sad",),
    "surprise": ("surprised",),
}
_CANONICAL = {other: name for name, others in _EXPRESSION_NAMES.items() for other in others}


@dataclass(frozen=True)
class Prompt:
    """A prompt that contains `CLASS_WORD`. `asks`: in the groups expression and pose, an expression or one of `POSES`; else a note."""

    group: str
    text: str
    asks: str = ""

    def words(self, class_word: str) -> str:
        """The prompt for a person with this noun."""
        return self.text.replace(CLASS_WORD, class_word)


def expression_name(name: str) -> str:
    """Normalise an expression name of any classifier: "Happy", "joy" and "Happiness" become "happiness"."""
    plain = name.strip().lower()
    return _CANONICAL.get(plain, plain)


def asked_pose_is_hit(asks: str, yaw: float, pitch: float) -> bool:
    """Whether a head pose matches the requested one.

    Args:
        yaw: degrees, positive if the nose points to the right of the image (`faces.pose`).
        pitch: degrees relative to the person's usual pitch, positive if the nose points up.

    The thresholds are ours: a yaw within 12 degrees is frontal, beyond 12 turned, beyond 25 a side view.
    """
    hits = {
        "front": abs(yaw) <= 12 and abs(pitch) <= 15,
        "side": abs(yaw) >= 25,
        "left": yaw <= -12,
        "right": yaw >= 12,
        "up": pitch >= 10,
        "down": pitch <= -10,
    }
    return hits[asks]


def built_in(groups: Sequence[str]) -> tuple[Prompt, ...]:
    """The built-in prompts of these groups."""
    return tuple(Prompt(group, text, asks) for group in groups for text, asks in _BUILT_IN[group])


_BUILT_IN: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (
        ("a photo of a <class word>", ""),
        ("a portrait of a <class word> in front of a plain grey wall", ""),
        ("a photo of the face of a <class word> in soft daylight", ""),
    ),
    "clothes": (
        ("a photo of a <class word> in a yellow raincoat", "yellow raincoat"),
        ("a photo of a <class word> wearing a knitted green sweater", "knitted green sweater"),
        ("a photo of a <class word> in a dark suit with a striped tie", "dark suit, striped tie"),
        ("a photo of a <class word> with a wide straw hat", "wide straw hat"),
    ),
    "scene": (
        ("a photo of a <class word> on a snowy mountain path", "snowy mountain path"),
        ("a photo of a <class word> between the shelves of an old library", "old library"),
        ("a photo of a <class word> at a night market under paper lanterns", "night market, lanterns"),
        ("a photo of a <class word> on a pebble beach at low tide", "pebble beach"),
    ),
    "action": (
        ("a photo of a <class word> playing the cello", "playing the cello"),
        ("a photo of a <class word> kneading dough at a kitchen table", "kneading dough"),
        ("a photo of a <class word> watering tomato plants on a balcony", "watering plants"),
        ("a photo of a <class word> repairing a bicycle in a workshop", "repairing a bicycle"),
    ),
    EXPRESSION: (
        ("a photo of a <class word> laughing with joy", "happiness"),
        ("a photo of a <class word> with a sad face, close to tears", "sadness"),
        ("a photo of a surprised <class word> with raised brows and an open mouth", "surprise"),
        ("a photo of an angry <class word> with a deep frown", "anger"),
    ),
    POSE: (
        ("a photo of a <class word> looking straight into the camera", "front"),
        ("a photo of a <class word> seen from the side, in profile", "side"),
        ("a photo of a <class word> whose head is turned to the left edge of the picture", "left"),
        ("a photo of a <class word> with the chin raised, looking up at the sky", "up"),
    ),
    "style": (
        ("a pencil drawing of a <class word>", "pencil drawing"),
        ("an oil painting of a <class word> with thick brush strokes", "oil painting"),
        ("a two-colour linocut print of a <class word>", "linocut print"),
        ("a clay figure of a <class word> on a shelf", "clay figure"),
    ),
    "age": (
        ("a photo of a <class word> as a small child", "small child"),
        ("a photo of a <class word> as a teenager", "teenager"),
        ("a photo of a very old <class word> with white hair and deep wrinkles", "very old"),
    ),
}
GROUPS = tuple(_BUILT_IN)
