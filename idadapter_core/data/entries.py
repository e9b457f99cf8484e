"""Photos before scanning, and the fields that describe them in tables and JSON files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from .rows import CLASS_NOUNS
from .texts import BLANK, caption_of

# Field names in tables: those of kohya, Hugging Face, IP-Adapter, FaceID-6M and our own shards.
FILE_KEYS = ("file", "file_name", "filename", "image_file", "image_path", "image", "path")
CAPTION_KEYS = ("caption", "text", "caption_en", "additional_feature", "description")
IDENTITY_KEYS = ("identity", "person")
NOUN_KEYS = ("class_noun", "gender", "sex")
_NOUNS = {
    **{noun: noun for noun in CLASS_NOUNS},
    **dict.fromkeys(("male", "m", "boy", "men"), "man"),
    **dict.fromkeys(("female", "f", "girl", "women"), "woman"),
}
_MEN = frozenset("man men male males boy boys gentleman guy he him his husband father actor".split())
_WOMEN = frozenset("woman women female females girl girls lady she her hers wife mother actress".split())


@dataclass(frozen=True, slots=True)
class ListedPhoto:
    """A photo before scanning: its location and its description."""

    source: str  # as in `Row.source`
    identity: str = ""
    caption: str = ""
    class_noun: str = ""  # "" if neither a label nor the caption tells
    offset: int = 0
    size: int = 0
    problem: str = ""  # reason why it cannot be used, even with a good face
    # False: no such file, or the row is not about a photo, for example an unreadable line.
    exists: bool = True


def noun_of_caption(caption: str) -> str:
    """man or woman if a caption mentions only one of them, else ""."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    men, women = bool(words & _MEN), bool(words & _WOMEN)
    return "" if men == women else "man" if men else "woman"


def with_noun(photo: ListedPhoto) -> ListedPhoto:
    return photo if photo.class_noun else replace(photo, class_noun=noun_of_caption(photo.caption))


def parse_json(text: str) -> Any:
    """Parse JSON, refusing an object with different values for the same key.

    Raises:
        ValueError: not JSON, nested too deeply, or a key with two values.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key!r:.60} is there twice, with different values")
        found[key] = value
    return found


def with_plain_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Normalise the keys of an entry: strip spaces, lower case.

    Raises:
        InputError: two keys become the same but have different values.
    """
    plain: dict[str, Any] = {}
    for key, value in entry.items():
        name = plain_key(key)
        if not is_absent(plain.get(name)) and not is_absent(value) and plain[name] != value:
            raise InputError(f"the field {name} is there twice, with different values")
        if is_absent(plain.get(name)):
            plain[name] = value
    return plain


def plain_key(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\r\n").casefold())


def described(entry: Mapping[str, Any]) -> ListedPhoto:
    """The description of a photo from an entry (normalised keys), without its location.

    Raises:
        InputError: names the field of the wrong type.
    """
    noun = value_of(entry, NOUN_KEYS, lenient=True).lower()
    if noun not in _NOUNS and not is_absent(entry.get("class_noun")):
        raise InputError(
            f"class_noun must be one of {', '.join(CLASS_NOUNS)}, got {entry['class_noun']!r:.60}"
        )
    text = value_of(entry, CAPTION_KEYS)
    try:
        caption = caption_of(text)
    except InputError as error:
        raise InputError(f"its caption cannot be used: {error}") from error
    return ListedPhoto("", value_of(entry, IDENTITY_KEYS), caption, _NOUNS.get(noun, ""))


def value_of(entry: Mapping[str, Any], keys: Sequence[str], *, lenient: bool = False) -> str:
    """The first of these fields that has a value. Of a list of captions, the first is used.

    Raises:
        InputError: no value is a text or a whole number (unless `lenient`).
    """
    wrong = ""
    for key in keys:
        value = entry.get(key)
        if isinstance(value, list):
            value = next((element for element in value if not is_absent(element)), None)
        if is_absent(value):
            continue
        if (
            isinstance(value, float) and value.is_integer()
        ):  # how pandas writes whole numbers of a column with gaps
            value = int(value)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value).strip(BLANK)
        wrong = wrong or f"{key} must be a text, got {value!r:.60}"
    if wrong and not lenient:
        raise InputError(wrong)
    return ""


def is_absent(value: object) -> bool:
    """Whether a value is missing: null, empty, or pandas' NaN."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | dict) and not value)
    )
