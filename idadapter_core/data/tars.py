"""Tar shards of webdataset: what is in them and where, so that a sample is read with one seek."""

from __future__ import annotations

import itertools
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Part:
    """A file in a tar."""

    name: str
    offset: int  # where its bytes begin
    size: int


@dataclass(frozen=True)
class Sample:
    """The files of a tar that belong together: all that follow each other with one name before the first dot."""

    key: str
    parts: dict[str, Part] = field(default_factory=dict)  # by what comes after the first dot, in lower case


def read_shard(path: Path) -> tuple[list[Sample], str]:
    """The whole samples of a shard, and what is wrong with the rest of it; "" where nothing is.

    Before a damage, the last sample counts as whole only where it has the same kinds of files as the one before it.
    """
    parts, problem, broken = _parts(path)
    samples = []
    for key, group in itertools.groupby(parts, key=lambda part: _split(part.name)[0]):
        samples.append(Sample(key, {_split(part.name)[1]: part for part in group}))
    if problem and samples:
        is_cut = bool(broken) and _split(broken)[0] == samples[-1].key
        if is_cut or len(samples) > 1 and samples[-1].parts.keys() != samples[-2].parts.keys():
            samples.pop()
    return samples, problem


def read_part(path: Path, part: Part) -> bytes:
    """The bytes of a file in a tar."""
    with path.open("rb") as file:
        file.seek(part.offset)
        return file.read(part.size)


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{x,y}.tar` written out, in order, as shells do it."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    numbers = _RANGE.fullmatch(found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [f"{value:0{len(numbers[1])}d}" for value in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [result for choice in choices for result in expand_braces(head + choice + tail)]


def _parts(path: Path) -> tuple[list[Part], str, str]:
    """The whole files of a tar, what is wrong after them, and the name of the one that is cut off, where that is known.

    A tar ends with a block of zeros. tarfile takes anything that is no header for the end, so the block is looked at here.
    """
    found: list[Part] = []
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg() and info.offset_data + info.size > size:
                    return found, f"it is cut off inside {info.name}", info.name
                if info.isreg():
                    found.append(Part(info.name, info.offset_data, info.size))
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(_BLOCK)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return found, f"it cannot be read on ({reason})", ""
    if len(block) < _BLOCK:
        return found, "it is cut off: its end mark is missing", ""
    return found, "it is damaged: what follows is no tar" if any(block) else "", ""


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()
