"""Indexes in JSON Lines, the format before Parquet; also used to show an index.

The first line holds the facts about the index; each following line is a row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import some
from .rows import CLASS_NOUNS, FIELDS, OK, SPLITS, STATUSES, Row

VERSION = 1
WANTED = {"version": int, "root": str, "rows": int, "embeddings": str}
"""Facts that every index has."""


def is_lines(path: Path) -> bool:
    """Whether a file is JSON Lines, not Parquet.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}). Name the index that `python -m idadapter_core scan` wrote."
        ) from error
    if not first:
        raise ConfigError(f"{path} is empty, so it is no index. Scan again.")
    return first == b"{"


def line_of(row: Row) -> str:
    """A row as JSON, without newline."""
    return json.dumps(
        {name: getattr(row, name) for name in FIELDS}, ensure_ascii=False, separators=(",", ":")
    )


class Lines:
    """An index in JSON Lines, validated line by line.

    Raises:
        ConfigError: names the file, the line and what is wrong with it; also while the rows are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.facts = _facts(path, file.readline())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error

    def rows(self) -> Iterator[Row]:
        count = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file):
                    if number:
                        yield _row(f"{self.path.name} line {number + 1}", line, count)
                        count += 1
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        if count != self.facts["rows"]:
            raise ConfigError(
                f"{self.path}: has {count} rows, but its first line says {self.facts['rows']}; it was cut off or edited. Scan again."
            )


def _facts(path: Path, line: bytes) -> Mapping[str, Any]:
    if not line:
        raise ConfigError(f"{path} is empty, so it is no index. Scan again.")
    try:
        facts = json.loads(line)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or any(type(facts.get(key)) is not kind for key, kind in WANTED.items()):
        raise ConfigError(
            f"{path}: its first line is not that of an index. Name the file that "
            "`python -m idadapter_core scan` wrote."
        )
    if facts["version"] != VERSION:
        raise ConfigError(
            f"{path}: is of version {facts['version']}, this program reads JSON Lines of version {VERSION}. Scan again."
        )
    return facts


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return type(value) is str


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: type(value) in (list, tuple) and len(value) == count and all(map(_number, value))


def _hex(digits: int) -> Callable[[Any], bool]:
    pattern = re.compile(f"([0-9a-f]{{{digits}}})?")
    return lambda value: type(value) is str and pattern.fullmatch(value) is not None


_pair, _box = _numbers(2), _numbers(4)
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "number": (_count, "a whole number"),
    "source": (lambda value: _text(value) and bool(value), "a path"),
    "sha256": (_hex(64), "64 hex digits"),
    "width": (_count, "a whole number"),
    "height": (_count, "a whole number"),
    "identity": (_text, "a text"),
    "caption": (_text, "a text"),
    "class_noun": (lambda value: value in CLASS_NOUNS, f"one of {', '.join(CLASS_NOUNS)}"),
    "box": (lambda value: value is None or _box(value), "four numbers or null"),
    "landmarks": (
        lambda value: (
            value is None or (type(value) in (list, tuple) and len(value) == 5 and all(map(_pair, value)))
        ),
        "five pairs of numbers or null",
    ),
    "score": (_number, "a number"),
    "faces": (_count, "a whole number"),
    "face_fraction": (_number, "a number"),
    "yaw": (_number, "a number"),
    "pitch": (_number, "a number"),
    "sharpness": (_number, "a number"),
    "phash": (_hex(16), "16 hex digits"),
    "split": (lambda value: value in SPLITS, "train, test or empty"),
    "status": (lambda value: value in STATUSES, f"one of {', '.join(STATUSES)}"),
    "reason": (_text, "a text"),
    "offset": (_count, "a whole number"),
    "size": (_count, "a whole number"),
}


def _row(where: str, line: bytes, number: int) -> Row:
    try:
        content = json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ConfigError(
            f"{where} is no JSON ({error}); the index was cut off or edited. Scan again."
        ) from error
    if not isinstance(content, dict) or content.keys() != _KINDS.keys():
        keys = content.keys() if isinstance(content, dict) else set()
        missing, unknown = _KINDS.keys() - keys, keys - _KINDS.keys()
        parts = [
            f"{word} {some(sorted(names))}"
            for word, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise ConfigError(f"{where} {' and '.join(parts)}. Scan again with this version.")
    for key, (check, kind) in _KINDS.items():
        if not check(content[key]):
            raise ConfigError(f"{where}: {key} must be {kind}, got {content[key]!r}. Scan again.")
    if content["box"] is not None:
        content["box"] = tuple(content["box"])
    if content["landmarks"] is not None:
        content["landmarks"] = tuple(tuple(point) for point in content["landmarks"])
    row = Row(**content)
    if problem := _contradiction(row, number):
        raise ConfigError(f"{where}: {problem}. Scan again.")
    return row


def _contradiction(row: Row, number: int) -> str:
    """Describe a contradiction in a row; empty if there is none."""
    if row.number != number:
        return f"number must be {number}, got {row.number}"
    if row.status != OK:
        return "" if row.reason else f"a row that is {row.status} needs a reason"
    if row.reason:
        return f"a row that is ok has no reason, got {row.reason!r}"
    for name in ("sha256", "width", "height", "box", "landmarks"):
        if not getattr(row, name):
            return f"a row that is ok needs {name}"
    return ""
