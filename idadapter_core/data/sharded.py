"""Photos in webdataset shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..errors import ConfigError, InputError
from .entries import ListedPhoto, described, parse_json, with_plain_keys
from .folders import Walk
from .index import IN_SHARD
from .inventory import (
    CUT,
    HIDDEN,
    OUTSIDE,
    SECOND,
    TEXT_SUFFIXES,
    Counter,
    ending_of,
    is_photo,
    kind_of,
    path_in,
)
from .photos import PHOTO_SUFFIXES, unread_suffixes
from .tars import Part, Sample, is_hidden, read_part, read_shard, shards_of
from .texts import decode_text, first_line


def photos_in_shards(
    given: str, encoding: str, counter: Counter, output: Path | None
) -> tuple[Path, list[ListedPhoto]]:
    """List the photos of a shard, of all shards below a folder, or of those that match a pattern.

    Returns the base folder of their sources and the photos. Files next to the shards are counted as unread.

    Raises:
        ConfigError: there is no shard, or one is compressed.
    """
    path = Path(given)
    rest: list[ListedPhoto] = []
    if path.is_dir():
        root = path
        shards, rest = _shards_below(path, counter, output)
    else:
        shards = shards_of(given)
        root = Path(os.path.commonpath([shard.parent.absolute() for shard in shards]))
    for shard in shards:
        if shard.suffix.lower() != ".tar":
            raise ConfigError(
                f"{shard}: a shard must be a .tar that is not compressed, because photos are read from its middle. Unpack it first."
            )
    photos: list[ListedPhoto] = []
    for shard in shards:
        photos += _Reader(
            shard, PurePosixPath(os.path.relpath(shard, root)).as_posix(), encoding, counter
        ).photos()
    return root, photos + rest


def _shards_below(
    folder: Path, counter: Counter, output: Path | None
) -> tuple[list[Path], list[ListedPhoto]]:
    walk = Walk(folder, output)
    shards = []
    for inside, names in walk:
        for name in names:
            if ending_of(name) == ".tar":
                shards.append(folder / inside / name)
            else:
                counter.add_unread(path_in(inside, name), OUTSIDE if is_photo(name) else "")
    return sorted(shards), walk.count_rest(counter)


class _Reader:
    """Reads the samples of one shard and counts its files."""

    def __init__(self, shard: Path, name: str, encoding: str, counter: Counter) -> None:
        self._shard = shard
        self._name = name
        self._encoding = encoding
        self._counter = counter
        self._used: set[int] = set()  # indices of used members
        self._seconds: set[int] = set()
        self._of_samples: set[int] = set()

    def photos(self) -> Iterator[ListedPhoto]:
        """One photo per sample, and one more row if part of the shard is unreadable."""
        found = read_shard(self._shard)
        for sample in found.samples:
            yield self._photo(sample)
        for part in found.parts:
            if part.place not in self._used:
                self._counter.add_unread(
                    f"{self._name}{IN_SHARD}{part.name}", self._kind(part, found.problem)
                )
        if not found.parts and not found.problem:
            yield ListedPhoto(self._name, problem="the shard holds no files; get it again", exists=False)
        if found.problem:
            problem = f"the shard gave {len(found.samples)} whole samples, then {found.problem}"
            yield ListedPhoto(self._name, problem=problem, exists=False)

    def _kind(self, part: Part, problem: str) -> str:
        """Reason why a member was not read."""
        if is_hidden(part.name):
            return HIDDEN
        if part.place in self._seconds:
            return SECOND
        return CUT if problem and part.place not in self._of_samples else kind_of(part.name)

    def _photo(self, sample: Sample) -> ListedPhoto:
        source = f"{self._name}{IN_SHARD}{sample.key}"
        self._of_samples |= {part.place for part in sample.parts.values()}
        kind = next((ending for ending in _endings() if ending in sample.parts), None)
        if kind is None:
            return ListedPhoto(source, problem=sample.problem or _no_photo(sample), exists=False)
        part = sample.parts[kind]
        self._seconds |= {other.place for other in sample.parts.values() if is_photo(other.name)}
        self._used.add(part.place)
        self._counter.photos += 1
        photo = ListedPhoto(
            source, offset=part.offset, size=part.size, problem=sample.problem or part.problem
        )
        try:
            return photo if photo.problem else self._described(photo, kind, sample)
        except InputError as error:
            return replace(photo, problem=str(error))

    def _described(self, photo: ListedPhoto, kind: str, sample: Sample) -> ListedPhoto:
        """Add the facts from the sample's other files to a photo. A caption file takes precedence over the JSON's caption."""
        facts = _beside(kind, sample, (".json",))
        if facts is not None:
            photo = replace(self._facts(facts), source=photo.source, offset=photo.offset, size=photo.size)
        part = _beside(kind, sample, TEXT_SUFFIXES)
        if part is None:
            return photo
        try:
            caption = first_line(self._text(part))
        except InputError as error:
            raise InputError(f"its caption {part.name} cannot be read: {error}") from error
        return replace(photo, caption=caption or photo.caption)

    def _facts(self, part: Part) -> ListedPhoto:
        try:
            facts = parse_json(self._text(part))
            if not isinstance(facts, dict):
                raise InputError(f"it holds a {type(facts).__name__}, no object")
            return described(with_plain_keys(facts))
        except (ValueError, InputError) as error:
            raise InputError(f"its .json cannot be read ({part.name}: {error})") from error

    def _text(self, part: Part) -> str:
        if part.problem:
            raise InputError(part.problem)
        self._used.add(part.place)
        self._counter.texts += 1
        return decode_text(read_part(self._shard, part), self._encoding)


def _beside(kind: str, sample: Sample, endings: Sequence[str]) -> Part | None:
    """The file with the first of these extensions, if any. As in folders, the photo's full name as prefix is preferred."""
    names = [f"{kind}{ending}" for ending in endings] + [ending[1:] for ending in endings]
    return next((sample.parts[name] for name in names if name in sample.parts), None)


def _endings() -> Iterator[str]:
    """Readable photo extensions, the preferred ones first."""
    return (suffix[1:] for suffix in PHOTO_SUFFIXES if suffix not in unread_suffixes())


def _no_photo(sample: Sample) -> str:
    for ending, part in sample.parts.items():
        if advice := unread_suffixes().get(f".{ending}"):
            return f"its photo {part.name} is of a kind that is not read: {advice}"
    return f"the sample has no photo, only {', '.join(sorted(e or part.name for e, part in sample.parts.items()))}"
