"""Settings from TOML files, for all programs: strict reading into dataclasses that check themselves, and writing them back.

Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import typing
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError
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


def parse_config(kind: type[T], content: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a table, strictly: only known keys, each of its own type.

    Raises:
        ConfigError: names the key, what it should be and what it is.
    """
    hints = typing.get_type_hints(kind)
    known = {entry.name: hints[entry.name] for entry in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{where}{key}"
        if key not in known:
            raise ConfigError(f"unknown setting {name}{nearest(key, known)}")
        expected = known[key]
        if dataclasses.is_dataclass(expected) and not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a section, write it as [{name}], got {value!r}")
        values[key] = _value(name, value, expected)
    return kind(**values)


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
        raise ConfigError(f"--set takes section.key=value, for example train.lr=1e-5, got {override!r}")
    value = parse_value(text.strip())
    table = content
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {override}: {part} is no section of single values; change it in the file"
            )
    table[path[-1]] = value


def _value(name: str, value: Any, expected: Any) -> Any:
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a table, got {value!r}")
        return parse_config(typing.cast(Any, expected), value, f"{name}.")
    origin = typing.get_origin(expected)
    if origin is tuple:
        kinds = typing.get_args(expected)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        if kinds[-1] is not Ellipsis and len(value) != len(kinds):
            raise ConfigError(f"{name} must have {len(kinds)} entries, got {value!r}")
        of_tables = dataclasses.is_dataclass(kinds[0])
        return tuple(
            _value(f"{name}[{number}]" if of_tables else name, entry, kinds[0])
            for number, entry in enumerate(value)
        )
    if origin is not None:  # a table of settings
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[expected]}, got {value!r}")
    if expected is str and not _is_text(value):
        raise ConfigError(
            f"{name}: {value!r} has bytes that are no UTF-8; give it in UTF-8, and rename a file or folder of that name"
        )
    if expected is str and value.startswith(("~/", "~\\")):
        return str(Path(value).expanduser())
    return value


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
