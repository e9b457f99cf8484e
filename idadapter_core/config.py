"""Settings of all programs in TOML files: strict parsing into self-validating dataclasses, and writing them back.

An unknown key is an error that names the nearest known key.
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
    """Add --config and --set, shared by all programs with a TOML file."""
    parser.epilog = (
        "See docs/training.md. Examples of TOML files are in configs. All settings are documented in "
        "idadapter_core/training/config.py, those of an evaluation in idadapter_core/evaluation/config.py."
    )
    parser.add_argument("--config", type=Path, required=True, help="the TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a setting of the file; can be repeated",
    )


@contextlib.contextmanager
def naming(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Context manager that adds the source of a configuration to errors about it."""
    try:
        yield
    except ConfigError as error:
        if f"{error}".startswith(f"{path}"):
            raise
        raise ConfigError(f"{path}{' and --set' if overrides else ''}: {error}") from error


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the tables of a TOML file and apply `section.key=value` overrides.

    Raises:
        ConfigError: no such file, broken TOML, or a malformed override.
    """
    content = read_table(path)
    for override in overrides:
        _override(content, override)
    return content


@dataclass(frozen=True)
class Changeable:
    """Annotation of a setting that a resumed run may change, because no step depends on it or its file is checked by digest."""

    when: Callable[[Any], bool] = lambda section: True
    """(section of the setting) -> whether it may change."""


MayChange = Annotated[T, Changeable()]
"""Type of a setting that a resumed run may change."""


class Settings:
    """Base of all settings dataclasses: no unknown keys, and strict types."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of settings -> current names."""

    # Read by pydantic, which is not imported before a file is read.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        schema = handler(source)
        handler.resolve_ref_schema(schema)["strict"] = False  # accepts a table for a dataclass
        return schema


S = TypeVar("S", bound=Settings)


def parse_config(kind: type[S], content: Mapping[str, Any]) -> S:
    """Parse a table into a dataclass, strictly: known keys only, each with its exact type.

    Raises:
        ConfigError: names the key, the expected type and the value found.
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
    """Rename settings in the tables of a record, possibly from an earlier release, to their current names."""
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
    """Convert a TOML value for validation: lists to tuples, ~ in paths expanded."""
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
    """Reword an error of pydantic."""
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
    """Resolve a location in the tables to its name, section class and type. An item of a list has the name of the list."""
    name, owner, here = "", kind, typing.cast(Any, kind)
    for part in where:
        if isinstance(part, str):
            owner, name = here, f"{name}.{part}" if name else part
            here = typing.get_type_hints(owner).get(part)
        elif dataclasses.is_dataclass(entry := typing.get_args(here)[0]):
            here, name = entry, f"{name}[{part}]"
    return name, owner, here


def fixed_settings(config: S) -> S:
    """Return the configuration with the default in every setting that a resumed run may change."""
    marks = typing.get_type_hints(type(config), include_extras=True)
    default, values = type(config)(), dict[str, Any]()
    for entry in _fields(type(config)):
        value = getattr(config, entry.name)
        if any(m.when(config) for m in typing.get_args(marks[entry.name]) if isinstance(m, Changeable)):
            values[entry.name] = getattr(default, entry.name)
        elif isinstance(value, Settings):
            values[entry.name] = fixed_settings(value)
    found: S = dataclasses.replace(typing.cast(Any, config), **values)
    return found


def _fields(kind: type[Settings]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(typing.cast(Any, kind))


def config_toml(config: Any) -> str:
    """Write a configuration as TOML with every value, such that `parse_config` reads back an equal one."""
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
    return json.dumps(value, ensure_ascii=False)  # same syntax as TOML for numbers, booleans and strings


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
    """Return whether a string is free of surrogate escapes: bytes of a command line or file name that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, or all of them."""
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
    """Reject control characters, which result from backslashes of a Windows path in double quotes: "C:\new\train"."""
    if any(character < " " for character in value):
        raise ConfigError(f"{name}: {value!r} has a control character; {BACKSLASHES}")


def existing(name: str, value: str) -> Path:
    """Return the existing file or folder of a setting.

    Raises:
        ConfigError: it does not exist, or cannot be accessed.
    """
    _require_path(name, value)
    path = Path(value).expanduser()
    try:
        is_there = path.exists()
    except OSError as error:  # no permission to enter a parent folder
        raise ConfigError(
            f"{name}: {value} cannot be read ({error.strerror}); correct the path, or the rights of its folders"
        ) from error
    if not is_there:
        where = "" if path.is_absolute() else f" (that is {path.absolute()})"
        raise ConfigError(f"{name}: {value} is not there{where}; correct the path")
    return path


def writable(name: str, value: str) -> Path:
    """Return the folder of a setting, which need not exist yet.

    Raises:
        ConfigError: it is a file, or cannot be written. Checked early, before hours of work.
    """
    _require_path(name, value)
    folder = Path(value).expanduser()
    above = [folder.absolute(), *folder.absolute().parents]
    try:
        there = next((path for path in above if path.is_symlink() or path.exists()), None)
        if there is None or not there.exists():  # missing drive or link target
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
