"""Inventory of every file given to a scan: read as a photo, text or table, or not read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import some
from .photos import PHOTO_SUFFIXES, unread_suffixes

TEXT_SUFFIXES = (".txt", ".caption")
"""Extensions of caption files; if a photo has both, the first is read."""
HIDDEN = "hidden"
NAMELESS = "without an ending"
LINKED = "folders that are there under another name"
NO_TABLE = "metadata tables that name no photos"
SECOND = "second photos of a sample"
OUTSIDE = "photos outside of the shards"
CUT = "files of damaged shards"
_TABLE_ADVICE = (
    "name the table itself to have it read, or call it metadata.jsonl or metadata.csv (with file_name, text)"
)
_CONVERT = "convert them to JPEG or PNG"
_VIDEO = "videos are not read; save frames as photos"
_PACKED = "unpack them"
_ADVICE = {
    HIDDEN: "names that start with a dot, as macOS writes them beside the real files, and webdataset's notes",
    NAMELESS: "give photos the ending of their format",
    LINKED: "links to a folder that was read already",
    SECOND: "one photo of a sample is read",
    OUTSIDE: "scan them with --layout folders or --layout captions",
    CUT: "the rest of their samples is lost",
    NO_TABLE: "its lines must name the photos in a field file_name",
    ".tar": "scan the shards with --layout webdataset",
    **dict.fromkeys(TEXT_SUFFIXES, "no photo of that name lies beside, or the photo has its caption from elsewhere or cannot be used"),
    **dict.fromkeys((".jsonl", ".csv", ".tsv", ".json"), _TABLE_ADVICE),
    **dict.fromkeys((".parquet", ".arrow", ".xlsx"), "write the table as .jsonl or .csv"),
    **dict.fromkeys((".zip", ".rar", ".7z", ".gz", ".tgz", ".bz2", ".xz", ".zst"), _PACKED),
    **dict.fromkeys((".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm"), _VIDEO),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"), "develop raw files to JPEG or PNG"),
    **dict.fromkeys((".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".svg", ".eps", ".ps", ".pdf", ".ai", ".wmf", ".emf"), _CONVERT),
    **dict.fromkeys((".xcf", ".exr", ".hdr", ".tga", ".dds", ".ico", ".pcx", ".ppm", ".pgm", ".pnm", ".qoi", ".avifs"), _CONVERT),
}  # fmt: skip


@dataclass(frozen=True)
class UnreadFiles:
    """Unread files of one kind."""

    kind: str  # lower-case extension, or another common property
    count: int
    first: str  # path of the first by name

    @property
    def advice(self) -> str:
        """How to get them read; "" if there is no way."""
        return {**_ADVICE, **unread_suffixes()}.get(self.kind, "")


@dataclass(frozen=True)
class Inventory:
    """Inventory of the files in a folder or in shards. The counts sum to the number of files."""

    photos: int = 0
    texts: int = 0  # captions, and sample descriptions
    tables: int = 0
    unread: tuple[UnreadFiles, ...] = ()

    @property
    def files(self) -> int:
        return self.photos + self.texts + self.tables + sum(kind.count for kind in self.unread)

    def facts(self) -> dict[str, Any]:
        """Plain values for an index."""
        unread = {kind.kind: {"count": kind.count, "first": kind.first} for kind in self.unread}
        return {
            "files": self.files,
            "photos": self.photos,
            "texts": self.texts,
            "tables": self.tables,
            "not_read": unread,
        }


class Counter:
    """Counts files for an inventory."""

    def __init__(self) -> None:
        self.photos = self.texts = self.tables = 0
        self._unread: dict[str, tuple[int, str]] = {}
        self._texts: dict[str, int] = {}  # unread so far, by name; a shard may hold a name twice

    def add_unread(self, name: str, kind: str = "") -> None:
        """Count a file as unread, by its extension or by the given kind."""
        kind = kind or kind_of(name)
        if kind in TEXT_SUFFIXES:
            self._texts[name] = self._texts.get(name, 0) + 1
        else:
            self._unread[kind] = _with(self._unread.get(kind), name, 1)

    def take_texts(self, root: Path, paths: Collection[Path]) -> int:
        """Remove files from the unread texts below the root. Returns the number of those that were there."""
        # A folder may have been read under the name of a link to it.
        left = {os.path.realpath(root / inside): inside for inside in {_folder(name) for name in self._texts}}
        places = {folder: left.get(os.path.realpath(folder)) for folder in {path.parent for path in paths}}
        taken = 0
        for path in paths:
            inside = places[path.parent]
            taken += self._texts.pop(path_in(inside, path.name), 0) if inside is not None else 0
        return taken

    def inventory(self) -> Inventory:
        # Kinds with advice come first, then the most numerous.
        unread = dict(self._unread)
        for name, count in self._texts.items():
            unread[kind_of(name)] = _with(unread.get(kind_of(name)), name, count)
        kinds = [UnreadFiles(kind, *found) for kind, found in unread.items()]
        kinds.sort(key=lambda kind: (not kind.advice, -kind.count, kind.kind))
        return Inventory(self.photos, self.texts, self.tables, tuple(kinds))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _with(before: tuple[int, str] | None, name: str, count: int) -> tuple[int, str]:
    """Add files to a count and keep the first name."""
    return (count, name) if before is None else (before[0] + count, min(before[1], name))


def path_in(inside: str, name: str) -> str:
    """Join a folder's path from the root ("" for the root) and a file name."""
    return f"{inside}/{name}" if inside else name


def ending_of(name: str) -> str:
    """Lower-case extension of a name or path, with its dot; "" if there is none."""
    base = name.rpartition("/")[2]
    stem, dot, ending = base.rpartition(".")
    return (dot + ending).lower() if stem else ""


def is_photo(name: str) -> bool:
    """Whether a name has a photo extension that can be read here."""
    ending = ending_of(name)
    return ending in PHOTO_SUFFIXES and ending not in unread_suffixes()


def kind_of(name: str) -> str:
    return HIDDEN if name.rpartition("/")[2].startswith(".") else ending_of(name) or NAMELESS


def describe_inventory(facts: Mapping[str, Any]) -> str:
    """Describe an inventory's facts, with advice for unread files; "" if nothing was counted."""
    if not facts.get("files"):
        return ""
    unread = dict(facts["not_read"])
    left = sum(int(kind["count"]) for kind in unread.values())
    counts = ", ".join(f"{facts[kind]} {kind}" for kind in ("photos", "texts", "tables"))
    head = f"files: {facts['files']}, of these {counts}, {left} not read"
    kinds = [UnreadFiles(kind, int(found["count"]), str(found["first"])) for kind, found in unread.items()]
    return "\n".join([head, *map(_line, kinds)])


def describe_unread(unread: Iterable[UnreadFiles]) -> str:
    """Describe unread files on one line, for a message."""
    return some(f"{kind.count} {kind.kind}{f' ({kind.advice})' * bool(kind.advice)}" for kind in unread)


def _line(kind: UnreadFiles) -> str:
    return (
        f"  not read: {kind.count} {kind.kind} (first {kind.first}){f': {kind.advice}' * bool(kind.advice)}"
    )
