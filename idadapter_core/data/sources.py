"""Lists the photos of a dataset, in the layouts that people and published datasets use (folders, tables, CelebA identity lists, shards)."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError, InputError
from ..files import some
from .captions import Captions, folded, stem_of
from .entries import ListedPhoto, noun_of_caption, with_noun
from .folders import PARTS, Walk, folder_of, nested_people, photos_in_folder
from .index import IN_SHARD
from .inventory import (
    TEXT_SUFFIXES,
    Counter,
    Inventory,
    UnreadFiles,
    describe_unread,
    ending_of,
    is_photo,
    path_in,
)
from .photos import PHOTO_SUFFIXES
from .sharded import photos_in_shards
from .tables import TABLE_SUFFIXES, named_photos, read_entries, read_lines
from .texts import check_encoding

__all__ = ["LAYOUTS", "ListedPhoto", "Source", "list_photos", "noun_of_caption"]

_PACKED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
LAYOUTS = ("auto", "folders", "captions", "list", "ip-adapter", "webdataset")


@dataclass(frozen=True)
class Source:
    """All photos of a dataset, in the order of its table or list, or else by path."""

    layout: str
    root: Path
    photos: tuple[ListedPhoto, ...]
    files: Inventory = Inventory()  # files of a folder or of shards; a table lists its photos only
    notes: tuple[str, ...] = ()  # remarks that are not errors, as whole sentences


def list_photos(
    given: str | Path,
    layout: str = "auto",
    *,
    root: Path | None = None,
    captions: Path | None = None,
    identities: Path | None = None,
    numbered: bool = False,
    encoding: str = "",
    min_match: float = 0.0,
    output: Path | None = None,
) -> Source:
    """List the photos of a dataset, with identity and caption if the layout has them. No photo is opened.

    - folders: one folder per person, at any depth; the folder's path is the identity.
    - captions: photos at any depth, of any person; or a table (.jsonl, .csv or .tsv) that names the photos.
    - list: a text file with one path per line (UniID).
    - ip-adapter: a JSON list of {"image_file", "text"}.
    - webdataset: .tar shards: all below a folder, one file, or a pattern with braces.

    In folders, metadata.jsonl and metadata.csv describe the photos that they name (Hugging Face's imagefolder). If the layout has no
    caption, the first line of the .txt or .caption file next to the photo is used, as in kohya's scripts.

    A photo whose caption or facts cannot be read gets a `problem` and is not used. Names match in any case.

    Args:
        layout: one of LAYOUTS; auto: detected from the files.
        root: base folder of the names in a table or list (default: the folder of the table or list).
        captions: a folder of text files, one per photo, with the photo's name (Multi-Modal CelebA-HQ).
        identities: a file with lines "image identity" (CelebA).
        numbered: the Nth line of a table, from 0, belongs to N.png, whatever path it names (FaceID-6M).
        encoding: of texts and tables that are not UTF-8 and have no byte order mark.
        output: the index to write. Its own files, left by an earlier scan in the folder, are not counted.
        min_match: share of the photos that `captions` and `identities` must each cover, 0..1.

    Raises:
        ConfigError: nothing found, or the files do not fit the layout.
    """
    text = str(given)
    check_encoding(encoding or "utf-8")
    chosen, is_table = _chosen_layout(text, layout, {"--root": root is not None, "--numbered": numbered})
    counter = Counter()
    if chosen == "webdataset":
        source = _from_shards(text, encoding, counter, output)
    elif not is_table:
        source = _from_folder(Path(text), chosen, encoding, counter, output)
    else:
        source = _from_table(Path(text), chosen, root, numbered, encoding)
    if not source.photos:
        raise ConfigError(_no_photos_found(text, replace(source, files=counter.inventory())))
    if identities is not None:
        source = _with_identities(source, identities, encoding, min_match)
        counter.tables += counter.take_texts(source.root, [identities])
    if captions is not None:
        source = _with_captions(source, captions, encoding, min_match, counter)
    source = replace(source, photos=tuple(map(with_noun, source.photos)), files=counter.inventory())
    share = _Share("captions", source.photos, lambda photo: bool(photo.caption))
    if captions is None and share.count:
        source = _with_note(source, f"{share}")
    return source


def _chosen_layout(text: str, layout: str, of_tables: Mapping[str, bool]) -> tuple[str, bool]:
    """Return the layout, and whether it is a table or list.

    Args:
        of_tables: options that only apply to tables and lists, and whether they are given.
    """
    chosen = _layout(text) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise ConfigError(f"--layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    is_table = chosen in ("list", "ip-adapter") or _is_table(Path(text))
    for option, is_given in of_tables.items():
        if is_given and (chosen == "webdataset" or not is_table):
            raise ConfigError(
                f"{option} belongs to a table or a list of photos; {text} is neither. Leave it out."
            )
    return chosen, is_table


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()


def _no_photos_found(text: str, source: Source) -> str:
    if Path(text).is_file() and source.layout != "webdataset":
        return f"{text} names no photos. Name a table or list that does."
    beside = f" It has {describe_unread(source.files.unread)}." if source.files.unread else ""
    return f"{text}: no photos found ({', '.join(PHOTO_SUFFIXES)}); name the folder or file that has them.{beside}"


def _layout(text: str) -> str:
    path = Path(text)
    if path.is_dir():
        return _layout_of_folder(path)
    ending = path.suffix.lower()
    if ending == ".tar" or ("{" in text and not os.path.lexists(path)):
        return "webdataset"
    if ending in TABLE_SUFFIXES:
        return "captions"
    if ending == ".json":
        return "ip-adapter"
    if ending == ".txt":
        return "list"
    if not path.exists():
        raise ConfigError(f"{text}: no such folder and no such file. Check the path.")
    if _PACKED_TAR.search(path.name):
        return "webdataset"  # its reader explains what to do
    advice = "" if ending in TEXT_SUFFIXES else UnreadFiles(ending, 1, text).advice
    raise ConfigError(
        f"{text}: neither a folder nor a file of a known kind (.tar, {', '.join(TABLE_SUFFIXES)}, .json, .txt). "
        + (
            f"For {ending} files: {advice}."
            if advice
            else "Name the folder that has the photos, or say with --layout what it is."
        )
    )


def _layout_of_folder(folder: Path) -> str:
    """Layout of a folder: "webdataset" if there are only shards; "auto" if the folders of the photos decide."""
    shards: list[str] = []
    photos = 0
    for inside, names in Walk(folder):
        shards += [path_in(inside, name) for name in names if ending_of(name) == ".tar"]
        photos += sum(map(is_photo, names))
    if shards and photos:
        raise ConfigError(
            f"{folder} has {photos} photos and {len(shards)} .tar files ({some(shards)}). Say which to scan: --layout webdataset (the "
            "shards), --layout folders (photos in a folder per person) or --layout captions (photos that say nothing about the person)."
        )
    return "webdataset" if shards else "auto"


def _from_folder(folder: Path, layout: str, encoding: str, counter: Counter, output: Path | None) -> Source:
    """List the photos below a folder. Layout auto means a folder per person if no photo lies outside of one."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder. The layout {layout} needs a folder of photos{', or a .jsonl or .csv table' * (layout == 'captions')}."
        )
    photos, rows = photos_in_folder(folder, encoding, counter, output)
    folders = {folder_of(photo) for photo in photos}
    if layout == "auto" and "" in folders and len(folders) > 1:
        raise ConfigError(
            f"{folder} has photos of its own and in folders ({sorted(folders)[1]}, ...). Say which they are: --layout folders (a "
            "folder per person) or --layout captions (the folder says nothing about the person)."
        )
    if layout == "auto" and folders and all(folded(name) in PARTS for name in folders):
        raise ConfigError(
            f"{folder} has photos in {some(sorted(folders))}, which looks like parts of a dataset. Say what they are: --layout captions (the "
            "folder says nothing about the person) or --layout folders (a folder per person)."
        )
    if layout == "captions" or folders == {""}:
        kept, nested, layout = photos, "", "captions"
    else:
        kept = [replace(photo, identity=photo.identity or folder_of(photo)) for photo in photos]
        nested, layout = nested_people(folders - {""}), "folders"
    listed = tuple(sorted(kept + rows, key=lambda photo: photo.source))
    return _with_note(Source(layout, folder, listed), nested)


def _from_table(path: Path, layout: str, root: Path | None, numbered: bool, encoding: str) -> Source:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the layout {layout} needs one.")
    start = root if root is not None else path.parent
    entries = read_entries(path, layout, encoding, numbered=numbered)
    return Source(layout, start, tuple(named_photos(path, start, entries, numbered, encoding)))


def _from_shards(text: str, encoding: str, counter: Counter, output: Path | None) -> Source:
    root, photos = photos_in_shards(text, encoding, counter, output)
    return Source("webdataset", root, tuple(photos))


# ---------------------------------------------------------------------------------------------------- texts elsewhere


def _with_identities(source: Source, path: Path, encoding: str, least: float) -> Source:
    names = _Names(source)
    known: dict[str, tuple[str, int]] = {}
    strangers: list[str] = []
    for number, line in read_lines(path, encoding):
        name, identity = _split_line(path, number, line, names)
        found = names.find(path, number, name)
        if not found:
            strangers.append(name)
        elif known.setdefault(found, (identity, number))[0] != identity:
            before, first = known[found]
            raise ConfigError(
                f"{path}: line {number} says that {found} shows {identity}, line {first} says {before}. Keep one of them."
            )
    if not known:
        raise ConfigError(
            f"{path} names none of the photos: it speaks of {next(iter(strangers), 'nothing')}, the photos are like "
            f'{source.photos[0].source}. Its lines must read "image identity" with the names of these files.'
        )
    share = _Share("identities", source.photos, lambda photo: photo.source in known)
    share.check("--identities", least)
    photos = tuple(
        replace(photo, identity=known[photo.source][0]) if photo.source in known else photo
        for photo in source.photos
    )
    return _with_note(replace(source, photos=photos), _rest(share, strangers, "Lines", path))


def _split_line(path: Path, number: int, line: str, names: _Names) -> tuple[str, str]:
    """Split a line into photo and person. If names contain spaces, the existing photos decide where to split."""
    gaps = [(gap.start(), gap.end()) for gap in re.finditer(r"\s+", line)]
    if not gaps:
        raise ConfigError(f'{path} line {number} must read "image identity", got {line!r:.100}')
    for start, end in (gaps[-1], *gaps):
        if names.find(path, number, line[:start]):
            return line[:start], line[end:]
    return line[: gaps[-1][0]], line[gaps[-1][1] :]


def _with_captions(source: Source, folder: Path, encoding: str, least: float, counter: Counter) -> Source:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; --captions takes one of text files, one for each photo")
    texts = _Texts(folder, encoding, map(folder_of, source.photos))
    photos = tuple(texts.describe(photo, _Names.name_of(source, photo)) for photo in source.photos)
    if not texts.used():
        existing = next((photo for photo in source.photos if photo.exists), source.photos[0])
        first = stem_of(_Names.name_of(source, existing))
        raise ConfigError(
            f"{folder} has no text file for any photo, for example none that is named {first}.txt. Name another folder."
        )
    share = _Share("captions", photos, lambda photo: bool(photo.caption))
    share.check("--captions", least)
    counter.texts += counter.take_texts(source.root, texts.used())
    return _with_note(replace(source, photos=photos), _rest(share, texts.unused(), "Texts", folder))


class _Texts:
    """The text files below a folder, for photos that lie elsewhere.

    They are looked up in folders named like those of the photos or, if there are none, anywhere, as long as the photo's name is
    unambiguous.
    """

    def __init__(self, folder: Path, encoding: str, homes: Iterable[str]) -> None:
        self._folders: dict[str, Captions] = {}
        self._texts: dict[str, list[str]] = {}  # folders with texts, by folded name
        self._owners: dict[tuple[str, str], str] = {}  # folder of the photo that a text was given to
        for inside, names in Walk(folder):
            self._folders[inside] = Captions(folder / inside, names, encoding)
            for name in self._folders[inside].names():
                places = self._texts.setdefault(folded(stem_of(name)), [])
                if inside not in places:
                    places.append(inside)
        self._by_case = {folded(inside): inside for inside in self._folders}
        self._mirrors = any(home and folded(home) in self._by_case for home in homes)

    def describe(self, photo: ListedPhoto, name: str) -> ListedPhoto:
        """Add the caption to a photo, if there is one."""
        if photo.problem:
            return photo
        try:
            place = self._place(folder_of(photo), name)
            if place is None:
                return photo
            captions = self._folders[place]
            text = captions.find(name)
            owner = self._owners.setdefault((place, text), folder_of(photo))
            if owner != folder_of(photo):
                raise ConfigError(
                    f"{captions.folder / text} may belong to photos in {owner or 'the root'} and in {folder_of(photo) or 'the root'}. "
                    "Sort the texts into folders of the same names."
                )
            return replace(photo, caption=captions.read(name) or photo.caption)
        except InputError as error:
            return replace(photo, problem=str(error))

    def _place(self, home: str, name: str) -> str | None:
        """The folder of the text for a photo of this name."""
        same = home if home in self._folders else self._by_case.get(folded(home))
        if same is not None and self._folders[same].find(name):
            return same
        if self._mirrors:
            return None
        places = dict.fromkeys(
            [*self._texts.get(folded(name), ()), *self._texts.get(folded(stem_of(name)), ())]
        )
        fitting = [place for place in places if self._folders[place].find(name)]
        if len(fitting) > 1:
            raise InputError(
                f"its caption may be in {some(fitting)}; sort the texts into folders like those of the photos"
            )
        return fitting[0] if fitting else None

    def used(self) -> list[Path]:
        return [captions.folder / name for captions in self._folders.values() for name in captions.used]

    def unused(self) -> list[str]:
        return [
            path_in(inside, name)
            for inside, captions in self._folders.items()
            for name in captions.names()
            if name not in captions.used
        ]


class _Names:
    """Finds photos by the names in a text: by path, or by file name if it is unique, in any case."""

    def __init__(self, source: Source) -> None:
        self._levels: list[dict[str, set[str]]] = [defaultdict(set) for _ in range(4)]
        self._is_sharded = source.layout == "webdataset"
        for photo in source.photos:
            name = self.name_of(source, photo)
            for level, key in zip(self._levels, self._keys(photo.source, name), strict=True):
                level[key].add(photo.source)

    @staticmethod
    def name_of(source: Source, photo: ListedPhoto) -> str:
        path = photo.source.rpartition(IN_SHARD)[2] if source.layout == "webdataset" else photo.source
        return path.rpartition("/")[2]

    @staticmethod
    def _keys(path: str, name: str) -> tuple[str, str, str, str]:
        return path, name, folded(path), folded(name)

    def find(self, table: Path, line: int, name: str) -> str:
        """Return the source of the photo, or "" if there is none.

        Raises:
            ConfigError: several photos have this name.
        """
        # Keys have no extensions.
        given = [name, stem_of(name)] if self._is_sharded and is_photo(name) else [name]
        for called in given:
            for level, key in zip(self._levels, self._keys(called, called), strict=True):
                found = level.get(key, ())
                if len(found) > 1:
                    raise ConfigError(
                        f"{table} line {line}: {name} may be {some(sorted(found))}. Write the path as it is shown here."
                    )
                if found:
                    return next(iter(found))
        return ""


class _Share:
    """Counts the existing photos that have something, such as a caption. Rows about missing files and bad lines do not count."""

    def __init__(self, kind: str, photos: Iterable[ListedPhoto], has: Callable[[ListedPhoto], bool]) -> None:
        existing = [photo for photo in photos if photo.exists]
        self._without = [photo.source for photo in existing if not has(photo)]
        self._kind = kind
        self._total = len(existing)
        self.count = len(existing) - len(self._without)

    def __str__(self) -> str:
        """For example "captions for 1 of 3 photos; first without: 2.jpg"."""
        text = f"{self._kind} for {self.count} of {self._total} photos"
        return f"{text}; first without: {self._without[0]}" if self._without else text

    def check(self, option: str, least: float) -> None:
        """Raise ConfigError if the share is smaller than `least`."""
        if self.count < least * self._total:
            raise ConfigError(
                f"{option}: {self}. At least {least:.1%} are asked for by --min-match; correct the names, or lower it."
            )


def _rest(share: _Share, unused: Sequence[str], kind: str, path: Path) -> str:
    if not unused:
        return f"{share}"
    return f"{share}. {kind} of {path} without a photo: {len(unused)}; first: {unused[0]}"


def _with_note(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note)) if note else source
