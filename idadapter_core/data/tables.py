"""Tables and lists of photos: csv, JSON Lines, a JSON list, or one path per line."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..encodings import encoding_by_zeros
from ..errors import ConfigError, InputError
from ..files import some
from .captions import Listings
from .entries import (
    CAPTION_KEYS,
    FILE_KEYS,
    IDENTITY_KEYS,
    NOUN_KEYS,
    ListedPhoto,
    described,
    is_absent,
    parse_json,
    plain_key,
    value_of,
    with_plain_keys,
)
from .texts import BLANK, MAX_CAPTION, decode_lines, decode_text, read_file, undecoded

CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (".jsonl", *CSV_SUFFIXES)
# Of a row that the csv module refuses: each further line means to parse the row again from its start.
_MAX_LINES = 1000
_DELIMITERS = ",;\t|"
_KEYS = (*FILE_KEYS, *CAPTION_KEYS, *IDENTITY_KEYS, *NOUN_KEYS)

Entry = Mapping[str, Any]
Numbered = tuple[int, int, Entry | str]
"""(entry number from 0, its first line or, in a JSON list, its number from 1, entry with normalised keys or an error text)."""


def read_entries(
    path: Path, layout: str, encoding: str, *, numbered: bool = False, needs_names: bool = True
) -> Iterator[Numbered]:
    """Read the entries of a table. Blank lines yield nothing but count in the entries' numbers.

    Args:
        layout: "list": one path per line; otherwise the file extension decides.
        numbered: entries belong to photos by number: rows with only empty fields count as entries, and no column must name photos.
        needs_names: refuse a csv without a column that names photos (unless numbered).

    Raises:
        ConfigError: the content does not match the file extension.
    """
    content, encoding = _content(path, encoding)
    ending = path.suffix.lower()
    try:
        if layout == "list":
            return _list_lines(content, encoding)
        if ending in CSV_SUFFIXES:
            return _csv_rows(path, decode_lines(content, encoding), numbered, needs_names and not numbered)
        if ending == ".jsonl":
            return _json_lines(decode_lines(content, encoding))
        return _json_list(path, _whole_text(content, encoding))
    except InputError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a text, with their numbers from 1. Raises ConfigError."""
    try:
        text = _whole_text(*_content(path, encoding))
    except InputError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return ((number + 1, line) for number, line in _lines(text))


def named_photos(
    path: Path, root: Path, entries: Iterator[Numbered], numbered: bool, encoding: str
) -> Iterator[ListedPhoto]:
    """The photo named by each entry of a table; a missing caption is read from the file next to the photo.

    Raises:
        ConfigError: the first readable entry names no photo.
    """
    listings = Listings(encoding)
    has_names = False
    for number, line, entry in entries:
        if isinstance(entry, str):
            yield ListedPhoto(f"{path.name}:{line}", problem=entry, exists=False)
            continue
        try:
            name = f"{number}.png" if numbered else value_of(entry, FILE_KEYS)
            if not name:
                if not has_names:
                    raise ConfigError(_nameless(path, number, entry))
                raise InputError("the entry names no photo")
            has_names = True
            if not _is_name(name):
                raise InputError("the entry names a photo with half a character or a NUL in its name")
        except InputError as error:
            yield ListedPhoto(f"{path.name}:{line}", problem=str(error), exists=False)
            continue
        yield _named(root, name, entry, listings)


def _is_name(name: str) -> bool:
    """Whether this is a possible file name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeError:
        return False


def _named(root: Path, name: str, entry: Entry, listings: Listings) -> ListedPhoto:
    problem = ""
    try:
        name = listings.find(root, name)
        photo = described(entry)
    except InputError as error:
        photo, problem = ListedPhoto(""), str(error)
    found = root / name
    if not photo.caption and not problem:
        try:
            photo = replace(photo, caption=listings.captions(found.parent).read(found.name))
        except InputError as error:
            problem = str(error)
    inside = found.is_relative_to(root)
    source = found.relative_to(root).as_posix() if inside else found.as_posix()
    return replace(photo, source=source, problem=problem, exists=os.path.lexists(found))


def _nameless(path: Path, number: int, entry: Entry) -> str:
    return (
        f"{path}: entry {number + 1} names no photo; a field {', '.join(FILE_KEYS[:-1])} or {FILE_KEYS[-1]} must. Its fields are "
        f"{some(entry, 10) or 'none'}. For photos that are named by their line (0.png, 1.png, ...) add --numbered."
    )


def _content(path: Path, encoding: str) -> tuple[bytes, str]:
    """The bytes of a table, and their encoding: the named one, or UTF-16 and the like without a mark; "" otherwise."""
    try:
        content = read_file(path)
        return content, encoding or encoding_by_zeros(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error


def _whole_text(content: bytes, encoding: str) -> str:
    """Raises InputError if a byte cannot be decoded."""
    text = decode_text(content, encoding)
    if bad := undecoded(text):
        raise InputError(bad)
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The non-empty lines, numbered from 0. Only \\n ends a line: names and JSON may contain other line breaks."""
    for number, line in enumerate(text.split("\n")):
        if stripped := line.strip(BLANK):
            yield number, stripped


def _list_lines(content: bytes, encoding: str) -> Iterator[Numbered]:
    # File names need not be UTF-8: other bytes are preserved.
    return ((number, number + 1, {"file": line}) for number, line in _lines(decode_lines(content, encoding)))


def _json_lines(text: str) -> Iterator[Numbered]:
    for number, line in _lines(text):
        entry: Entry | str
        if bad := undecoded(line):
            entry = f"the line has bytes that cannot be read: {bad}"
        else:
            entry = _parsed(line)
        yield number, number + 1, entry


def _parsed(line: str) -> Entry | str:
    try:
        return _object(parse_json(line), "the line")
    except ValueError as error:
        return f"the line is no JSON ({error})"


def _object(value: object, name: str) -> Entry | str:
    if not isinstance(value, dict):
        return f"{name} is no JSON object"
    try:
        return with_plain_keys(value)
    except InputError as error:
        return str(error)


def _json_list(path: Path, text: str) -> Iterator[Numbered]:
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise ConfigError(
            f"{path} is no JSON ({error}). IP-Adapter's list is one JSON file; a file with an object per line must end in .jsonl."
        ) from error
    if not isinstance(entries, list):
        raise ConfigError(
            f'{path} must hold a list of {{"image_file", "text"}}, it holds a {type(entries).__name__}'
        )
    return ((number, number + 1, _object(entry, "the entry")) for number, entry in enumerate(entries))


# ---------------------------------------------------------------------------------------------------- csv


def _csv_rows(path: Path, text: str, numbered: bool, needs_names: bool) -> Iterator[Numbered]:
    declared = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's declaration of the delimiter
    body = text[declared.end() :] if declared else text
    skipped = int(declared is not None)
    delimiter = declared[1] if declared else _delimiter(body)
    rows = _parsed_csv(path, body, delimiter, skipped, numbered)
    line, fields = next((row for row in rows if _says_something(row[1])), (0, []))
    if isinstance(fields, str):
        raise ConfigError(f"{path}: the row that begins in line {line} {fields}.")
    if not fields:
        raise ConfigError(f"{path} is empty. Name a table with photos.")
    if bad := _undecoded(fields):
        raise ConfigError(f"{path}: its first line has bytes that cannot be read: {bad}.")
    header = [plain_key(name) for name in fields]
    if needs_names and not any(name in FILE_KEYS for name in header):
        raise ConfigError(_headless(path, fields))
    for name in (name for name in header if name in _KEYS and header.count(name) > 1):
        raise ConfigError(
            f"{path}: the column {name} is there {header.count(name)} times. Remove or rename one."
        )
    return (
        (number, line, _of_row(header, row))
        for number, (line, row) in enumerate(rows)
        if _says_something(row) or (numbered and row)
    )


def _says_something(row: Sequence[str]) -> bool:
    return any(field.strip() for field in row)


def _headless(path: Path, fields: Sequence[str]) -> str:
    return (
        f"{path}: no column names the photos. Its first line has {some(fields, 10)}; one must be {', '.join(FILE_KEYS)}. Add such a "
        "line, or, for photos that are named by their line (0.png, 1.png, ...), --numbered."
    )


def _delimiter(text: str) -> str:
    """The delimiter that splits the first line into the most known fields."""
    line = next((line for line in text.splitlines() if line.strip()), "")

    def known(delimiter: str) -> int:
        with contextlib.suppress(csv.Error):
            fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
            return sum(plain_key(field) in _KEYS for field in fields)
        return 0

    return max(_DELIMITERS, key=known)


def _parsed_csv(
    path: Path, text: str, delimiter: str, skipped: int, counted: bool
) -> Iterator[tuple[int, list[str] | str]]:
    """The rows, each with the number of its first line, or with the reason why it is unreadable. A blank line has no fields.

    Raises:
        ConfigError: an unreadable row has an unclear end: it spans several lines, or rows are counted.
    """
    line = skipped + 1
    taken: list[str] = []  # lines of the current row

    def lines() -> Iterator[str]:
        for content in io.StringIO(text, newline=""):
            taken.append(content)
            yield content

    source = lines()
    reader = csv.reader(source, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        before = csv.field_size_limit(len(text) + 1)  # global to the process; `_of_row` has its own limit
        line += len(taken)
        taken.clear()
        row: list[str] | str | None
        try:
            row = next(reader, None)
        except csv.Error as error:
            fields = _fields("".join(taken).rstrip("\r\n"), delimiter)
            while fields is None and len(taken) < _MAX_LINES and next(source, ""):
                fields = _fields("".join(taken).rstrip("\r\n"), delimiter)
            row = fields or _unreadable(error)
            if isinstance(row, str) and (counted or len(taken) > 1):
                raise ConfigError(f"{path}: the row that begins in line {line} {row}.") from error
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield line, row


def _unreadable(error: csv.Error) -> str:
    return f"cannot be read ({error}). Quotes inside a field are doubled, and each quote that opens a field needs one that closes it"


def _fields(row: str, delimiter: str) -> list[str] | None:
    """Parse the fields of a row that the csv module refuses.

    Accepts spaces after a quoted field and, with tabs as delimiters, quotes as part of a field. Returns an empty list if the row is
    neither, None if it continues on the next line.
    """
    end = re.escape(delimiter)
    quoted = rf' *"([^"]*(?:""[^"]*)*)" *(?={end}|\Z)'
    plain = rf"([^{end}\r\n]*)" if delimiter == "\t" else rf'(?! *")([^{end}\r\n]*)'
    field = re.compile(f"{quoted}|{plain}")
    is_open = re.compile(r' *"[^"]*(?:""[^"]*)*\Z')
    fields: list[str] = []
    place = -1
    while place < len(row):
        found = field.match(row, place + 1)
        if not found or found.end() < len(row) and row[found.end()] != delimiter:
            return None if is_open.match(row, place + 1) else []
        fields.append(found[2] if found[1] is None else found[1].replace('""', '"'))
        place = found.end()
    return fields


def _undecoded(row: Sequence[str]) -> str:
    return next(filter(None, map(undecoded, row)), "")


def _of_row(header: Sequence[str], row: Sequence[str] | str) -> Entry | str:
    if isinstance(row, str):
        return f"the row {row}"
    if bad := _undecoded(row):
        return f"the row has bytes that cannot be read: {bad}"
    if len(row) != len(header):
        return f"the row has {len(row)} fields, the first line has {len(header)}; put texts with the delimiter in them into quotes"
    for name, value in zip(header, row, strict=True):
        if name in _KEYS and len(value) > MAX_CAPTION:
            return (
                f"the row has {len(value):,} characters in the field {name}, at most {MAX_CAPTION:,} are read"
            )
    return {name: value for name, value in zip(header, row, strict=True) if not is_absent(value)}
