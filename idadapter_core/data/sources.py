"""Where photos come from: the ways in which people and published datasets lay them out on disk."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigError
from .index import CLASS_NOUNS, IN_SHARD
from .tars import Sample, expand_braces, read_part, read_shard

LAYOUTS = ("auto", "folders", "captions", "list", "ip-adapter", "webdataset")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_TABLES = (".jsonl", ".csv")

# What the fields of tables are called: by kohya, Hugging Face, IP-Adapter, FaceID-6M and our own shards.
_FILE_KEYS = ("file", "file_name", "filename", "image_file", "image_path", "image", "path")
_CAPTION_KEYS = ("caption", "text", "caption_en", "additional_feature", "description")
_IDENTITY_KEYS = ("identity", "person")
_NOUN_KEYS = ("class_noun", "gender", "sex")
_NOUNS = {
    **{noun: noun for noun in CLASS_NOUNS},
    **dict.fromkeys(("male", "m", "boy", "men"), "man"),
    **dict.fromkeys(("female", "f", "girl", "women"), "woman"),
}
_MEN = frozenset("man men male males boy boys gentleman guy he him his husband father actor".split())
_WOMEN = frozenset("woman women female females girl girls lady she her hers wife mother actress".split())


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo before it is looked at: where it is, and what was said about it."""

    source: str  # as in `Row.source`
    identity: str = ""
    caption: str = ""
    class_noun: str = ""  # "" where neither a label nor the caption tells
    offset: int = 0
    size: int = 0
    problem: str = ""  # why there is nothing to read


@dataclass(frozen=True)
class Source:
    """All photos of a dataset, in its own order: that of a table or list, else by path."""

    layout: str
    root: Path
    photos: tuple[Photo, ...]


def list_photos(
    given: str | Path,
    layout: str = "auto",
    *,
    root: Path | None = None,
    captions: Path | None = None,
    identities: Path | None = None,
    numbered: bool = False,
) -> Source:
    """Every photo of a dataset, with identity and caption where the layout tells them. No photo is opened.

    - folders: photos of a person in a folder of their own, at any depth; the folder's path is the identity.
    - captions: photos at any depth, whoever they show; or a table (.jsonl or .csv) that names the photos.
    - list: a text file with a path in each line (UniID).
    - ip-adapter: a JSON list of {"image_file", "text"}.
    - webdataset: .tar shards: all below a folder, one file, or a pattern with braces.

    Without a caption in the layout, the first line of the .txt file beside the photo is taken, as kohya's scripts have it.

    Args:
        layout: one of LAYOUTS; auto tells them apart by what is there.
        root: the folder that names in a table or list start from (default: where the table or list is).
        captions: a folder of text files, one for each photo, of the photo's name (Multi-Modal CelebA-HQ).
        identities: a file with lines "image identity" (CelebA).
        numbered: the Nth line of a table, from 0, belongs to N.png, whatever path it names (FaceID-6M).

    Raises:
        ConfigError: nothing there, or not what the layout says.
    """
    text = str(given)
    chosen = _layout(text) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise ConfigError(f"--layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if chosen == "webdataset":
        source = _from_shards(text)
    elif chosen in ("auto", "folders", "captions") and Path(text).suffix.lower() not in _TABLES:
        source = _from_folder(Path(text), chosen)
    else:
        source = _from_table(Path(text), chosen, root, numbered)
    photos: Sequence[Photo] = source.photos
    if not photos:
        raise ConfigError(
            f"{text}: no photos found ({', '.join(PHOTO_SUFFIXES)}); name the folder or file that has them"
        )
    if identities is not None:
        photos = _with_identities(photos, identities)
    if captions is not None:
        photos = _with_captions(photos, captions)
    return replace(source, photos=tuple(_with_noun(photo) for photo in photos))


def noun_of_caption(caption: str) -> str:
    """man or woman where the words of a caption speak of one of them only, else ""."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    men, women = bool(words & _MEN), bool(words & _WOMEN)
    return "" if men == women else "man" if men else "woman"


def _layout(text: str) -> str:
    path = Path(text)
    if path.suffix == ".tar" or "{" in text:
        return "webdataset"
    if path.suffix.lower() in _TABLES:
        return "captions"
    if path.suffix.lower() == ".json":
        return "ip-adapter"
    if path.suffix.lower() == ".txt":
        return "list"
    if not path.is_dir():
        raise ConfigError(
            f"{text}: no such folder, and no file of a known kind (.tar, .jsonl, .csv, .json, .txt). Check the path."
        )
    if any(entry.suffix == ".tar" for entry in path.iterdir()):
        return "webdataset"
    return "auto"  # told by where the photos lie


def _from_folder(folder: Path, layout: str) -> Source:
    """The photos below a folder; for the layout auto, a folder per person where none lies outside of one."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder. The layout {layout} needs a folder of photos{', or a .jsonl or .csv table' * (layout == 'captions')}."
        )
    photos = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(place) in seen:  # a link to a folder that was read already, perhaps one above it
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        inside = Path(place).relative_to(folder).as_posix()
        texts = {name for name in names if name.lower().endswith(".txt")}
        for name in names:
            stem, dot, ending = name.rpartition(".")
            if (dot + ending).lower() not in PHOTO_SUFFIXES or not stem or stem.startswith("."):
                continue
            beside = f"{stem}.txt"
            photos.append(
                Photo(
                    source=name if inside == "." else f"{inside}/{name}",
                    identity="" if inside == "." else inside,
                    caption=_first_line(Path(place) / beside) if beside in texts else "",
                )
            )
    photos.sort(key=lambda photo: photo.source)
    people = {photo.identity for photo in photos}
    if layout == "auto" and "" in people and len(people) > 1:
        raise ConfigError(
            f"{folder} has photos of its own and in folders ({sorted(people)[1]}, ...). Say which they are: --layout folders (a "
            "folder per person) or --layout captions (the folder says nothing about the person)."
        )
    if layout == "captions" or people == {""}:
        return Source("captions", folder, tuple(replace(photo, identity="") for photo in photos))
    return Source("folders", folder, tuple(photos))


def _from_table(path: Path, layout: str, root: Path | None, numbered: bool) -> Source:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the layout {layout} needs one.")
    start = root if root is not None else path.parent
    entries: Iterable[tuple[int, Mapping[str, Any] | str]]
    if layout == "list":
        entries = ((number, {"file": line}) for number, line in _lines(path))
    elif path.suffix.lower() == ".csv":
        entries = enumerate(csv.DictReader(_text(path).splitlines()))
    elif path.suffix.lower() == ".jsonl":
        entries = _json_lines(path)
    else:
        entries = enumerate(_json_list(path))
    return Source(layout, start, tuple(_named(path, start, *entry, numbered) for entry in entries))


def _named(table: Path, root: Path, number: int, entry: Mapping[str, Any] | str, numbered: bool) -> Photo:
    """The photo that an entry of a table names. A text in place of an entry says what is wrong with it."""
    if isinstance(entry, str):
        return Photo(f"{table.name}:{number + 1}", problem=entry)
    photo = _described(entry)
    name = f"{number}.png" if numbered else _value(entry, _FILE_KEYS)
    if not name:
        raise ConfigError(
            f"{table}: entry {number + 1} names no photo; a field {', '.join(_FILE_KEYS[:-1])} or {_FILE_KEYS[-1]} must. For "
            "photos that are named by their line (0.png, 1.png, ...) add --numbered."
        )
    found = root / name
    with_text = found.with_suffix(".txt")
    if not photo.caption and with_text.is_file():
        photo = replace(photo, caption=_first_line(with_text))
    inside = found.is_relative_to(root)
    return replace(photo, source=found.relative_to(root).as_posix() if inside else found.as_posix())


def _from_shards(text: str) -> Source:
    path = Path(text)
    if path.is_dir():
        shards = sorted(path.rglob("*.tar"))
        root = path
    else:
        shards = [Path(name) for name in expand_braces(text)]
        root = Path(os.path.commonpath([shard.parent.absolute() for shard in shards]))
    for shard in shards:
        if shard.suffix != ".tar":
            raise ConfigError(
                f"{shard}: a shard must be a .tar that is not compressed, because photos are read from its middle. Unpack it first."
            )
    photos: list[Photo] = []
    for shard in shards:
        photos += _of_shard(shard, PurePosixPath(os.path.relpath(shard, root)).as_posix())
    return Source("webdataset", root, tuple(photos))


def _of_shard(shard: Path, name: str) -> Iterator[Photo]:
    """The photos of a shard, and one more row for what cannot be read of it."""
    samples, problem = read_shard(shard)
    for sample in samples:
        yield _of_sample(shard, name, sample)
    if problem:
        yield Photo(name, problem=f"the shard gave {len(samples)} whole samples, then {problem}")


def _of_sample(shard: Path, name: str, sample: Sample) -> Photo:
    source = f"{name}{IN_SHARD}{sample.key}"
    part = next((sample.parts[s[1:]] for s in PHOTO_SUFFIXES if s[1:] in sample.parts), None)
    if part is None:
        return Photo(source, problem=f"the sample has no photo, only {', '.join(sorted(sample.parts))}")
    try:
        facts = json.loads(read_part(shard, sample.parts["json"])) if "json" in sample.parts else {}
    except ValueError as error:
        return Photo(source, problem=f"its .json cannot be read ({error})")
    photo = _described(facts if isinstance(facts, dict) else {})
    if "txt" in sample.parts:
        lines = read_part(shard, sample.parts["txt"]).decode("utf-8", "replace").splitlines()
        photo = replace(photo, caption=_clean(next(filter(str.strip, lines), "")))
    return replace(photo, source=source, offset=part.offset, size=part.size)


def _described(entry: Mapping[str, Any]) -> Photo:
    return Photo(
        source="",
        identity=_value(entry, _IDENTITY_KEYS),
        caption=_clean(_value(entry, _CAPTION_KEYS)),
        class_noun=_NOUNS.get(_value(entry, _NOUN_KEYS).lower(), ""),
    )


def _value(entry: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of these fields that says something. Of a list of captions the first counts."""
    for key in keys:
        value = entry.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def _with_identities(photos: Sequence[Photo], path: Path) -> list[Photo]:
    known: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines()):
        parts = line.rsplit(maxsplit=1)
        if len(parts) == 2:
            known[parts[0].strip()] = parts[1]
        elif parts:
            raise ConfigError(f'{path} line {number + 1} must read "image identity", got {line!r}')
    named = [
        replace(photo, identity=known.get(photo.source) or known.get(_name(photo.source)) or photo.identity)
        for photo in photos
    ]
    if not any(photo.source in known or _name(photo.source) in known for photo in photos):
        raise ConfigError(
            f"{path} names none of the photos: it speaks of {next(iter(known), 'nothing')}, the photos are like {photos[0].source}. "
            'Its lines must read "image identity" with the names of these files.'
        )
    return named


def _with_captions(photos: Sequence[Photo], folder: Path) -> list[Photo]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; --captions takes one of text files, one for each photo")
    texts = {entry.stem for entry in folder.iterdir() if entry.suffix == ".txt"}
    stems = [_name(photo.source).rpartition(".")[0] or _name(photo.source) for photo in photos]
    if not texts.intersection(stems):
        raise ConfigError(
            f"{folder} has no text file for any photo, for example none that is named {stems[0]}.txt. Name another folder."
        )
    return [
        replace(photo, caption=_first_line(folder / f"{stem}.txt")) if stem in texts else photo
        for photo, stem in zip(photos, stems, strict=True)
    ]


def _with_noun(photo: Photo) -> Photo:
    return photo if photo.class_noun else replace(photo, class_noun=noun_of_caption(photo.caption))


def _name(source: str) -> str:
    return source.rpartition(IN_SHARD)[2].rpartition("/")[2]


def _first_line(path: Path) -> str:
    return _clean(next((line for line in _text(path).splitlines() if line.strip()), ""))


def _clean(caption: str) -> str:
    """One line, without halves of characters, which scraped texts have and tokenizers refuse."""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, each with its number from 0."""
    for number, line in enumerate(
        _text(path).split("\n")
    ):  # not splitlines: JSON texts may hold other line breaks
        if line.strip():
            yield number, line.strip()


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            yield number, f"the line is no JSON ({error})"
            continue
        yield number, entry if isinstance(entry, dict) else "the line is no JSON object"


def _json_list(path: Path) -> Iterator[Mapping[str, Any] | str]:
    try:
        entries = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no JSON ({error}). IP-Adapter's list is one JSON file; a file with an object per line must end in .jsonl."
        ) from error
    if not isinstance(entries, list):
        raise ConfigError(
            f'{path} must hold a list of {{"image_file", "text"}}, it holds a {type(entries).__name__}'
        )
    return (entry if isinstance(entry, dict) else "the entry is no JSON object" for entry in entries)
