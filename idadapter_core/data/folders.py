"""Photos in folders: one folder per person or one for all, with captions next to the photos."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigError, InputError
from ..files import some
from .captions import Captions, folded
from .entries import FILE_KEYS, ListedPhoto, described, value_of
from .inventory import HIDDEN, LINKED, NO_TABLE, TEXT_SUFFIXES, Counter, ending_of, is_photo, path_in
from .photos import unread_suffixes
from .tables import read_entries

PARTS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"))
"""Folder names that mean a part of a dataset, not a person."""
_METADATA = ("metadata.jsonl", "metadata.csv")
"""Tables of Hugging Face's imagefolder: they describe photos in their folder and below."""


@dataclass
class Walk:
    """Walks the files below a folder.

    Hidden files, and folders that cannot be listed or were already visited, are collected separately; files of the index to write are
    skipped.
    """

    root: Path
    output: Path | None = None
    hidden: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    closed: list[tuple[str, str]] = field(default_factory=list)  # (folder that cannot be opened, reason)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder's path from the root ("" for the root) and the sorted names of its files."""
        seen: set[str] = set()
        own = _own_files(self.output)
        for place, folders, names in os.walk(self.root, onerror=self._closed, followlinks=True):
            inside = _posix(Path(place).relative_to(self.root))
            # Enter hidden folders, but not by links, so that their files are counted.
            if any(part.startswith(".") for part in PurePosixPath(inside).parts):
                folders[:] = [name for name in folders if not Path(place, name).is_symlink()]
                self.hidden += [path_in(inside, name) for name in names]
                continue
            real = os.path.realpath(place)
            if real in seen:  # a link to a visited folder, perhaps one above it
                folders.clear()
                self.linked.append(inside)
                continue
            seen.add(real)
            if own is not None and real == own[0]:
                names = [name for name in names if not own[1].fullmatch(name)]
                folders[:] = [name for name in folders if not own[1].fullmatch(name)]
            self.hidden += [path_in(inside, name) for name in names if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not _is_hidden_link(place, name))
            yield inside, sorted(name for name in names if not name.startswith("."))

    def _closed(self, error: OSError) -> None:
        place = _posix(Path(os.fsdecode(error.filename or self.root)).relative_to(self.root))
        self.closed.append((place or ".", error.strerror or str(error)))

    def count_rest(self, counter: Counter) -> list[ListedPhoto]:
        """Count the files and folders collected separately. Returns a row per folder that cannot be opened."""
        for name in self.hidden:
            counter.add_unread(name, HIDDEN)
        for name in self.linked:
            counter.add_unread(name, LINKED)
        return [
            ListedPhoto(place, problem=f"the folder cannot be opened ({why})", exists=False)
            for place, why in self.closed
        ]


def _own_files(output: Path | None) -> tuple[str, re.Pattern[str]] | None:
    """The folder of an index, and a pattern of the names of its files and results folder there, to skip those of an earlier scan."""
    if output is None:
        return None
    name, stem = re.escape(output.name), re.escape(output.stem)
    beside = rf"{stem}\.[0-9a-f]{{16}}\.(safetensors|map)"
    pattern = rf"{name}(\.progress)?|\.{name}\.[0-9a-f]{{8}}|{beside}|\.{beside}\.([0-9a-f]{{8}}|lock)"
    return os.path.realpath(output.parent), re.compile(pattern)


def _is_hidden_link(place: str, name: str) -> bool:
    return name.startswith(".") and Path(place, name).is_symlink()


def photos_in_folder(
    folder: Path, encoding: str, counter: Counter, output: Path | None
) -> tuple[list[ListedPhoto], list[ListedPhoto]]:
    """All photos below a folder, by path, and a row for each unreadable item that may hold photos.

    Identities come from metadata tables only.
    """
    walk = Walk(folder, output)
    photos: list[ListedPhoto] = []
    metadata = _Metadata(folder, encoding)
    texts: dict[str, Captions] = {}
    for inside, names in walk:
        texts[inside] = Captions(folder / inside, names, encoding)
        for name in names:
            path = path_in(inside, name)
            if is_photo(name):
                photos.append(ListedPhoto(path))
            elif folded(name) in _METADATA:
                _count_table(metadata, inside, name, counter)
            elif ending_of(name) not in TEXT_SUFFIXES:
                counter.add_unread(path)
    counter.photos += len(photos)
    photos = [_with_text(photo, texts) for photo in metadata.described(photos)]
    for inside, captions in texts.items():
        counter.texts += len(captions.used)
        for name in captions.names():
            if name not in captions.used:
                counter.add_unread(path_in(inside, name))
    rows = metadata.unplaced() + walk.count_rest(counter)
    return sorted(photos, key=lambda photo: photo.source), sorted(rows, key=lambda row: row.source)


def _count_table(metadata: _Metadata, inside: str, name: str, counter: Counter) -> None:
    if metadata.add(inside, name):
        counter.tables += 1
    else:
        counter.add_unread(path_in(inside, name), NO_TABLE)


def folder_of(photo: ListedPhoto) -> str:
    """Folder of a photo, relative to the root; "" for the root."""
    return photo.source.rpartition("/")[0]


def nested_people(folders: Collection[str]) -> str:
    """A remark about photo folders inside a folder that has photos, too; "" if there are none."""
    inner = sorted(
        f for f in folders if any(parent.as_posix() in folders for parent in PurePosixPath(f).parents)
    )
    if not inner:
        return ""
    return (
        f"{len(inner)} folders of photos lie in a folder that has photos too ({some(inner)}); each counts as a person of its own. "
        "Where they show the person of the outer folder, move the photos there."
    )


class _Metadata:
    """The metadata tables below a folder, by the photos that they name."""

    def __init__(self, root: Path, encoding: str) -> None:
        self._root = root
        self._encoding = encoding
        self._photos: dict[str, ListedPhoto] = {}
        self._by_case: dict[str, list[str]] = {}
        self._rows: list[ListedPhoto] = []  # for unreadable lines
        self._met: set[str] = set()

    def add(self, inside: str, name: str) -> bool:
        """Read a table. Returns False if it is another kind of table, which names no photos."""
        path = self._root / inside / name
        try:
            entries = list(read_entries(path, "captions", self._encoding, needs_names=False))
        except ConfigError as error:
            self._rows.append(ListedPhoto(path_in(inside, name), problem=str(error), exists=False))
            return True
        if not any(
            isinstance(entry, str) or any(key in entry for key in FILE_KEYS) for _, _, entry in entries
        ):
            return False
        for _, line, entry in entries:
            where = f"{path_in(inside, name)}:{line}"
            if isinstance(entry, str):
                self._rows.append(ListedPhoto(where, problem=entry, exists=False))
            else:
                self._take(inside, where, entry)
        return True

    def _take(self, inside: str, where: str, entry: Mapping[str, Any]) -> None:
        try:
            named = value_of(entry, FILE_KEYS).replace("\\", "/")
            if not named:
                raise InputError("the entry names no photo")
        except InputError as error:
            self._rows.append(ListedPhoto(where, problem=str(error), exists=False))
            return
        source = self._source(inside, named)
        try:
            photo = replace(described(entry), source=source)
        except InputError as error:
            photo = ListedPhoto(source, problem=f"{where}: {error}")
        before = self._photos.get(source)
        if before is not None and before != photo:
            photo = ListedPhoto(
                source, problem=f"{where} says something else about it than an earlier line; keep one of them"
            )
        self._photos[source] = photo
        if before is None:
            self._by_case.setdefault(folded(source), []).append(source)

    def _source(self, inside: str, named: str) -> str:
        """Path from the root of a photo named by a table in this folder."""
        root = os.path.abspath(self._root)  # noqa: PTH100, which would follow links
        path = os.path.normpath(os.path.join(root, inside, named))  # noqa: PTH118
        try:
            return Path(os.path.relpath(path, root)).as_posix()
        except ValueError:  # on another drive (Windows)
            return Path(path).as_posix()

    def described(self, photos: Sequence[ListedPhoto]) -> list[ListedPhoto]:
        """Add the facts from the tables to the photos of the folder."""
        sources = {photo.source for photo in photos}
        return [self._described(photo, sources) for photo in photos]

    def _described(self, photo: ListedPhoto, sources: Collection[str]) -> ListedPhoto:
        name = photo.source
        if name not in self._photos:
            # Ignore case, unless the name is exactly another photo's.
            same = [other for other in self._by_case.get(folded(name), ()) if other not in sources]
            if len(same) != 1:
                return photo
            (name,) = same
        self._met.add(name)
        return replace(self._photos[name], source=photo.source)

    def unplaced(self) -> list[ListedPhoto]:
        """Rows for lines that are unreadable, or name no photo of the folder."""
        absent = [
            replace(photo, problem=photo.problem or _absent(self._root, photo.source), exists=False)
            for name, photo in self._photos.items()
            if name not in self._met
        ]
        return self._rows + absent


def _absent(root: Path, source: str) -> str:
    if advice := unread_suffixes().get(ending_of(source)):
        return f"photos of this kind are not read: {advice}"
    if not os.path.lexists(root / source):
        return "a metadata table names it, but there is no such file"
    return "a metadata table names it, but it is no photo of this folder"


def _with_text(photo: ListedPhoto, texts: Mapping[str, Captions]) -> ListedPhoto:
    if photo.caption or photo.problem:
        return photo
    inside, _, name = photo.source.rpartition("/")
    try:
        return replace(photo, caption=texts[inside].read(name))
    except InputError as error:
        return replace(photo, problem=str(error))


def _posix(path: Path) -> str:
    return "" if path == Path() else path.as_posix()
