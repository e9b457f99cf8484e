"""Settings from TOML files, for all programs: strict reading into dataclasses that check themselves, and writing them back.

Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import os
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from .errors import ConfigError
from .extra import require
from .toml import BACKSLASHES, parse_value, read_table

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --set, which all programs with a TOML file have."""
    parser.epilog = (
        "docs/training.md goes through it all. Examples of TOML files are in configs; every setting is explained in "
        "idadapter_core/training/config.py, those of an evaluation in idadapter_core/evaluation/config.py."
    )
    parser.add_argument("--config", type=Path, required=True, help="the TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a setting of the file; may be given several times",
    )


@contextlib.contextmanager
def naming(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Errors about a configuration say where it comes from."""
    try:
        yield
    except ConfigError as error:
        if f"{error}".startswith(f"{path}"):
            raise
        raise ConfigError(f"{path}{' and --set' if overrides else ''}: {error}") from error


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file, with `section.key=value` overrides on top.

    Raises:
        ConfigError: no such file, broken TOML, or an override that names nothing.
    """
    content = read_table(path)
    for override in overrides:
        _override(content, override)
    return content


@dataclass(frozen=True)
class Changeable:
    """Annotation of a setting that a resumed run may change: no step depends on it, or its file is known by digest instead."""

    when: Callable[[Any], bool] = lambda section: True
    """Whether it may, given the section that the setting is in."""


MayChange = Annotated[T, Changeable()]
"""Type of a setting that a resumed run may change."""


class Settings:
    """Base of all dataclasses that TOML is read into: no unknown keys, and each value of its own type."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """The names that settings had before, and those they have now."""

    # pydantic reads these two; nothing here imports it before a file is read.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        schema = handler(source)
        handler.resolve_ref_schema(schema)["strict"] = False  # a table stands for a dataclass
        return schema


S = TypeVar("S", bound=Settings)


def parse_config(kind: type[S], content: Mapping[str, Any]) -> S:
    """A dataclass from a table, strictly: only known keys, each of its own type.

    Raises:
        ConfigError: names the key, the type it should have and the value found.
    """
    validation_error = require("pydantic").ValidationError
    prepared = {key: _prepared(key, value) for key, value in content.items()}
    try:
        found: S = _adapter(typing.cast(Any, kind)).validate_python(prepared)
    except validation_error as error:
        first, *others = error.errors()
        more = f" ({len(others)} more: {', '.join(_place(kind, e['loc'])[0] for e in others)})"
        raise ConfigError(f"{_sentence(kind, first)}{more if others else ''}") from None
    return found


def with_new_names(kind: type[Settings], content: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a record that an earlier release may have written, with today's names of settings."""
    hints = typing.get_type_hints(kind)
    found = {kind.renamed.get(key, key): value for key, value in content.items()}
    for key, value in found.items():
        section = hints.get(key)
        if isinstance(value, Mapping) and isinstance(section, type) and issubclass(section, Settings):
            found[key] = with_new_names(section, value)
    return found


@functools.cache
def _adapter(kind: type[Settings]) -> Any:
    return require("pydantic").TypeAdapter(kind)


def _prepared(name: str, value: Any) -> Any:
    """A value of TOML as validation expects it: a list as a tuple, a path without ~."""
    if isinstance(value, Mapping):
        return {key: _prepared(f"{name}.{key}", entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_prepared(name, entry) for entry in value)
    if not isinstance(value, str):
        return value
    if not _is_text(value):
        raise ConfigError(
            f"{name}: {value!r} has bytes that are no UTF-8; give it in UTF-8, and rename a file or folder of that name"
        )
    return str(Path(value).expanduser()) if value.startswith(("~/", "~\\")) else value


_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
}


def _sentence(kind: type[Settings], error: Mapping[str, Any]) -> str:
    """An error of pydantic in our words."""
    problem, value = error["type"], error["input"]
    name, owner, expected = _place(kind, error["loc"])
    if problem == "unexpected_keyword_argument":
        head, _, key = name.rpartition(".")
        if key in owner.renamed:
            return f"{name} is called {head}{head and '.'}{owner.renamed[key]} now"
        return f"unknown setting {name}{nearest(key, (entry.name for entry in _fields(owner)))}"
    got = list(value) if isinstance(value, tuple) else value
    if problem == "dataclass_type":
        return (
            f"{name} is a table, got {got!r}"
            if name.endswith("]")
            else f"{name} is a section, write it as [{name}], got {got!r}"
        )
    if problem in ("missing", "too_long"):
        return f"{name} must have {len(typing.get_args(expected))} entries, got {got!r}"
    if problem in _WORDS:
        return f"{name} must be {_WORDS[problem]}, got {got!r}"
    return f"{name}: {error['msg']}, got {got!r}"


def _place(kind: type[Settings], where: Sequence[str | int]) -> tuple[str, type[Settings], Any]:
    """A place in the tables: its name, the section it is in, its type. A single value in a list goes by the list's name."""
    name, owner, here = "", kind, typing.cast(Any, kind)
    for part in where:
        if isinstance(part, str):
            owner, name = here, f"{name}.{part}" if name else part
            here = typing.get_type_hints(owner).get(part)
        elif dataclasses.is_dataclass(entry := typing.get_args(here)[0]):
            here, name = entry, f"{name}[{part}]"
    return name, owner, here


def decisive(config: S) -> S:
    """The configuration with its default in every setting that a resumed run may change."""
    marks = typing.get_type_hints(type(config), include_extras=True)
    default, values = type(config)(), dict[str, Any]()
    for entry in _fields(type(config)):
        value = getattr(config, entry.name)
        if any(m.when(config) for m in typing.get_args(marks[entry.name]) if isinstance(m, Changeable)):
            values[entry.name] = getattr(default, entry.name)
        elif isinstance(value, Settings):
            values[entry.name] = decisive(value)
    found: S = dataclasses.replace(typing.cast(Any, config), **values)
    return found


def _fields(kind: type[Settings]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(typing.cast(Any, kind))


def config_toml(config: Any) -> str:
    """A configuration as TOML, every value written out, which `parse_config` reads back as it was."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        content = getattr(config, section.name)
        if isinstance(content, tuple):
            for table in content:
                lines += [f"[[{section.name}]]", *_table(table, section.name), ""]
        else:
            lines += [f"[{section.name}]", *_table(content, section.name), ""]
    return "\n".join(lines)


def _table(table: Any, name: str) -> list[str]:
    lines: list[str] = []
    tables: list[str] = []
    for entry in dataclasses.fields(table):
        value = getattr(table, entry.name)
        if isinstance(value, Mapping):
            tables += [
                f"[{name}.{entry.name}]",
                *(f"{literal(k)} = {literal(v)}" for k, v in value.items()),
            ]
        else:
            lines.append(f"{entry.name} = {literal(value)}")
    return lines + tables


def literal(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(literal, value))}]"
    return json.dumps(value, ensure_ascii=False)  # TOML writes numbers, booleans and texts in the same way


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(
            f"--set takes section.key=value, for example train.learning_rate=1e-5, got {override!r}"
        )
    value = parse_value(text.strip())
    table = content
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {override}: {part} is no section of single values; change it in the file"
            )
    table[path[-1]] = value


def _is_text(value: str) -> bool:
    """Whether no byte is in it that the command line or a name on the disk had and UTF-8 has not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown name: which one was perhaps meant, or all there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(names)}"


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        close = difflib.get_close_matches(value, options, 1, cutoff=0.5)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{name} must be one of {', '.join(options)}, got {value!r}{meant}")


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least or value == float("inf"):
        raise ConfigError(f"{name} must be a finite number of at least {least}, got {value}")


def within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low} and {high}, got {value}")


def _require_path(name: str, value: str) -> None:
    """Refuse control characters, which come of the backslashes of a Windows path in double quotes: "C:\new\train"."""
    if any(character < " " for character in value):
        raise ConfigError(f"{name}: {value!r} has a control character; {BACKSLASHES}")


def existing(name: str, value: str) -> Path:
    """The file or folder that a setting names.

    Raises:
        ConfigError: there is none, or it cannot be looked at.
    """
    _require_path(name, value)
    path = Path(value).expanduser()
    try:
        is_there = path.exists()
    except OSError as error:  # a folder above it that may not be entered
        raise ConfigError(
            f"{name}: {value} cannot be looked at ({error.strerror}); correct the path, or the rights of its folders"
        ) from error
    if not is_there:
        where = "" if path.is_absolute() else f" (that is {path.absolute()})"
        raise ConfigError(f"{name}: {value} is not there{where}; correct the path")
    return path


def writable(name: str, value: str) -> Path:
    """The folder that a setting names, which need not be there yet.

    Raises:
        ConfigError: it is a file, or cannot be written. Better told before hours of work than after them.
    """
    _require_path(name, value)
    folder = Path(value).expanduser()
    above = [folder.absolute(), *folder.absolute().parents]
    try:
        there = next((path for path in above if path.is_symlink() or path.exists()), None)
        if there is None or not there.exists():  # a drive, or what a link points to
            raise ConfigError(
                f"{name}: {there or folder} leads nowhere; name another folder, or bring its disk back"
            )
        if not there.is_dir():
            raise ConfigError(f"{name}: {there} is a file; name a folder")
        probe = there / f".{uuid.uuid4().hex}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{name}: {folder} cannot be written ({error.strerror}); name another folder, or make this one writable"
        ) from error
    return folder
