"""Lenient TOML reader: accepts byte order marks and UTF-16, and explains Windows paths in double quotes."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .encodings import encoding_by_mark, encoding_by_zeros
from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BACKSLASHES = (
    "in double quotes a backslash begins an escape (\\t is a tab): write a Windows path in single quotes, "
    "'C:\\models\\base', or with /, \"C:/models/base\""
)
_LINE = re.compile(r"at line (\d+)")
_WORD = re.compile(r"[^\s\"'=/\\.,]+")
_IN_DOUBLE_QUOTES = re.compile(r'"[^"]*(?<!\\)\\(?!\\)')  # a double backslash is intended


def read_table(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ConfigError: no such file, another encoding, or broken TOML; names the line and the correct form.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name the TOML file of the run.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name another file.") from error
    text = _decoded(path, content)
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: no valid TOML: {error}. {_advice(text, error)}.") from error
    return table


def parse_value(text: str) -> Any:
    """Parse a TOML value; anything else is returned as an unquoted string.

    Raises:
        ConfigError: an invalid string in double quotes.
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.startswith('"') and text.endswith('"') and "\\" in text:
            raise ConfigError(f"{text} cannot be read ({error}): {BACKSLASHES}.") from error
        return text


def _advice(text: str, error: Exception) -> str:
    found = _LINE.search(f"{error}")
    lines = text.split("\n")
    broken = lines[int(found[1]) - 1 : int(found[1])] if found else []
    if any(map(_IN_DOUBLE_QUOTES.search, broken or lines)):
        return f"There, {BACKSLASHES}"
    return f"Correct that line: {broken[0].strip()[:80]}" if broken else "Correct that line"


def _decoded(path: Path, content: bytes) -> str:
    encoding = encoding_by_mark(content) or encoding_by_zeros(content) or "utf-8"
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        if encoding.startswith(("utf-16", "utf-32")):
            raise ConfigError(
                f"{path}: begins as {name}, but breaks off or is damaged at byte {error.start}; save it once more, as UTF-8."
            ) from error
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}){_likeness(content)}. Save the file as UTF-8."
        ) from error


def _likeness(content: bytes) -> str:
    """Guess the encoding of a text and quote a word decoded with it. A single letter is not enough to guess."""
    for name, encoding, fits in _OTHERS:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        words = [word for word in _WORD.findall(text) if not word.isascii()]
        if words and all(map(fits, words)):
            if sum(not letter.isascii() for word in words for letter in word) < 2:
                break
            return f"; it seems to be {name}, in which it reads {words[0]!r}"
    return "; it is in no encoding of Unicode"


def _is_of(*scripts: str) -> Callable[[str], bool]:
    """Return a predicate: whether a word has no letters other than ASCII and those of these scripts."""

    def fits(word: str) -> bool:
        return all(unicodedata.name(c, "").startswith(scripts) for c in word if not c.isascii())

    return fits


def _is_word_of(script: str) -> Callable[[str], bool]:
    """`_is_of` for a script whose words contain no Latin letters and no capitals after the first letter."""
    is_of = _is_of(script)

    def fits(word: str) -> bool:
        letters = "".join(c for c in word if c.isalpha())
        is_mixed = any(c.isascii() for c in letters)
        return not is_mixed and is_of(word) and (letters[1:].islower() or letters.isupper())

    return fits


# Strictest first: scripts that bytes of another encoding rarely produce by chance.
_OTHERS = (
    ("Windows-1251", "cp1251", _is_word_of("CYRILLIC")),
    ("Shift JIS (cp932)", "cp932", _is_of("HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC")),
    ("EUC-KR (cp949)", "cp949", _is_of("HANGUL SYLLABLE")),
    ("GB18030", "gb18030", _is_of("CJK", "FULLWIDTH", "IDEOGRAPHIC")),
    ("Big5", "big5", _is_of("CJK", "FULLWIDTH", "IDEOGRAPHIC")),
    ("Windows-1253", "cp1253", _is_word_of("GREEK")),
    ("Windows-1252", "cp1252", lambda word: True),
)

__all__ = ["BACKSLASHES", "parse_value", "read_table"]
