"""Tar shards of webdataset: list their content and positions, so that a sample is read with one seek."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError
from ..files import some
from .inventory import TEXT_SUFFIXES
from .photos import PHOTO_SUFFIXES
from .texts import require_file

MAX_SHARDS = 1_000_000
"""Limit on the files that a pattern expands to."""
_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PHOTOS = frozenset(ending[1:] for ending in PHOTO_SUFFIXES)
_TEXTS = frozenset((*(ending[1:] for ending in TEXT_SUFFIXES), "json"))
_PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK", "zip"),
)
_LINKS = 40  # longest chain of links


@dataclass(frozen=True)
class Part:
    """A file in a tar."""

    name: str
    offset: int  # start of its bytes
    size: int
    place: int  # index among the files of the tar, from 0
    problem: str = ""  # reason why its bytes cannot be read


@dataclass(frozen=True)
class Sample:
    """Files of a tar with the same name up to the first dot, in any order.

    A text may have the photo's whole name before its extension (`a.jpg.txt`). Names with more dots are grouped by the part before the
    last dot if each such group has a photo (`a.01.jpg, a.01.txt, a.02.jpg`).
    """

    key: str
    # By the rest of the name after the key and a dot, in lower case.
    parts: dict[str, Part] = field(default_factory=dict)
    problem: str = ""  # reason why its files are ambiguous


@dataclass(frozen=True)
class Shard:
    """The content of a tar."""

    samples: list[Sample]
    parts: list[Part]  # all intact files, including hidden ones
    problem: str = ""  # damage to the rest of the tar; "" if there is none


def read_shard(path: Path) -> Shard:
    """Read the intact samples of a shard, in the order of their first files, and the damage to the rest.

    Files with a path component that starts with a dot, such as those added by macOS, belong to no sample. Links within the shard are
    followed. Before damage, the last sample counts as intact only if it has the same kinds of files as the one before; if the samples of
    a shard are not contiguous, every sample must have the same kinds as the first.
    """
    parts, problem, broken = _parts(path)
    visible = [part for part in parts if not is_hidden(part.name)]
    runs: list[str] = []
    groups: dict[str, list[tuple[str, Part]]] = {}
    for part in visible:
        key, ending = _split(part.name)
        groups.setdefault(key, []).append((ending, part))
        if not runs or runs[-1] != key:
            runs.append(key)
    samples = [
        sample for key, members in _joined_by_case(groups).items() for sample in _samples(key, members)
    ]
    if problem and samples:
        samples, lost = _whole(samples, broken, is_sorted=len(runs) == len(set(runs)))
        if lost > 1:
            problem += f"; {lost} samples lack files that come later in it"
    return Shard(samples, parts, problem)


def read_part(path: Path, part: Part) -> bytes:
    """Read the bytes of a file in a tar."""
    with path.open("rb") as file:
        file.seek(part.offset)
        return file.read(part.size)


def shards_of(pattern: str) -> list[Path]:
    """The files that a name or pattern stands for. Existing folders and files whose names contain braces are taken literally.

    Raises:
        ConfigError: more than a million.
    """
    path = Path(pattern)
    known = Path(path.anchor)
    rest = list(path.parts[1:] if path.anchor else path.parts)
    while rest and os.path.lexists(known / rest[0]):
        known /= rest.pop(0)
    return [known / name for name in expand_braces("/".join(rest))] if rest else [known]


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{000..002}.tar` and `{x,y}.tar`, in order, as shells do. Other braces are kept.

    Raises:
        ConfigError: more than a million names.
    """
    names = [""]
    start = 0
    for found in _BRACES.finditer(pattern):
        choices = _choices(found[1])
        if not choices:
            continue
        if len(names) * len(choices) > MAX_SHARDS:
            raise ConfigError(
                f"{pattern} stands for more than {MAX_SHARDS:,} files. Correct the numbers in braces."
            )
        names = [name + pattern[start : found.start()] + choice for name in names for choice in choices]
        start = found.end()
    return [name + pattern[start:] for name in names]


def _choices(inside: str) -> Sequence[str]:
    """The alternatives in braces; none if the braces are part of a name."""
    numbers = _RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",") if "," in inside else []
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= MAX_SHARDS:
        raise ConfigError(f"{{{inside}}} stands for more than {MAX_SHARDS:,} files. Correct the numbers.")
    step = 1 if last >= first else -1
    return [f"{value:0{len(numbers[1])}d}" for value in range(first, last + step, step)]


# ---------------------------------------------------------------------------------------------------- members


def _parts(path: Path) -> tuple[list[Part], str, str]:
    """The intact files of a tar, the damage after them, and the name of the truncated file, if known.

    A tar ends with a block of zeros. tarfile treats every invalid header as the end, so the block is checked here.
    """
    found: list[Part] = []
    links: list[tuple[int, str]] = []  # index in `found`, and the link's target name
    problem = broken = ""
    try:
        size = require_file(path)
        with path.open("rb") as file:
            start = file.read(8)
        packed = next((name for mark, name in _PACKED if start.startswith(mark)), "")
        if packed:
            return found, f"it cannot be read on (it is compressed with {packed}; unpack it first)", ""
        with tarfile.open(path, "r:") as tar:
            before = -1
            while (info := tar.next()) is not None:
                if info.size < 0 or tar.offset <= before:
                    problem = f"it is damaged at {info.name}"
                    break
                before = tar.offset
                name = _plain(info.name)
                if info.isreg() and info.sparse is None and info.offset_data + info.size > size:
                    problem, broken = f"it is cut off inside {info.name}", name
                    break
                if info.islnk() or info.issym():
                    links.append((len(found), _target(name, info)))
                if not info.isdir():
                    found.append(_part(name, info, len(found)))
            end = tar.offset
        problem = problem or _end_problem(path, end)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return _linked(found, links), f"it cannot be read on ({reason})", ""
    return _linked(found, links), problem, broken


def _end_problem(path: Path, end: int) -> str:
    """Describe damage where tarfile sees the end of a tar: only zeros may follow, up to the end of the file."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            return "it is cut off: its end mark is missing"
        if any(block):
            return "it is damaged: what follows is no tar"
        while block := file.read(1 << 20):
            if block.count(0) < len(block):
                return "it goes on after its end mark, like tars joined with cat; join them with tar --concatenate, or scan each"
    return ""


def _part(name: str, info: tarfile.TarInfo, place: int) -> Part:
    problem = ""
    if info.sparse is not None:
        problem = f"{name} is stored with gaps (sparse); pack the shard again without that"
    elif info.islnk() or info.issym():
        problem = f"{name} is a link to {info.linkname}, which is no file of this shard; pack the shard again with the file itself"
    elif not info.isreg():
        problem = f"{name} is a device or a pipe, no file"
    return Part(name, info.offset_data, info.size, place, problem)


def _target(name: str, info: tarfile.TarInfo) -> str:
    """Target of a link: hard links name the member, symbolic links are relative to their own folder."""
    if info.islnk():
        return _plain(info.linkname)
    if info.linkname.startswith("/"):
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))


def _linked(parts: list[Part], links: Sequence[tuple[int, str]]) -> list[Part]:
    """Replace links by the position and size of their targets, if present."""
    resolved = list(parts)
    targets = dict(links)
    places: dict[str, list[int]] = {}
    for place, part in enumerate(parts):
        places.setdefault(part.name, []).append(place)
    for place, _ in links:
        at: int | None = place
        for _ in range(_LINKS):
            if at is None or at not in targets:
                break
            same = places.get(targets[at], [])
            # The last one before the link, as when it was packed, or the first one after it.
            at = next((number for number in reversed(same) if number < at), same[0] if same else None)
        if at is not None and at not in targets:
            resolved[place] = replace(parts[at], name=parts[place].name, place=place)
    return resolved


def _plain(name: str) -> str:
    """A member's name without `./` and the like."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def is_hidden(name: str) -> bool:
    """Whether a member with this name belongs to no sample."""
    folder, _, base = name.rpartition("/")
    # webdataset keeps metadata of a shard in members called __name__.
    return any(part.startswith(".") and part != ".." for part in name.split("/")) or bool(
        folder == "" and re.fullmatch(r"__.*__(\..*)?", base)
    )


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


# ---------------------------------------------------------------------------------------------------- samples


_Members = list[tuple[str, Part]]  # each with the part of its name after the first dot


def _joined_by_case(groups: Mapping[str, _Members]) -> dict[str, _Members]:
    """Add files without a photo to the only sample whose name differs from theirs by case alone."""
    photos: dict[str, list[str]] = {}
    for key, members in groups.items():
        if any(_ending(name) in _PHOTOS for name, _ in members):
            photos.setdefault(key.casefold(), []).append(key)
    joined: dict[str, _Members] = {key: [] for key in groups}
    for key, members in groups.items():
        same = photos.get(key.casefold(), [])
        joined[same[0] if len(same) == 1 else key] += members
    return {key: members for key, members in joined.items() if members}


def _samples(key: str, members: _Members) -> list[Sample]:
    """The samples among files with the same name up to the first dot: usually one."""
    photos = {_stem(name) for name, _ in members if _ending(name) in _PHOTOS}
    texts = {_stem(name) for name, _ in members if _is_text(name)}
    if photos <= {""}:
        return _unique(key, members)
    if "" in photos:
        # `a.mask.png` next to `a.jpg` is another kind of image; with its own text, it is a separate sample.
        own = (photos & texts) - {""}
        return _unique(key, [m for m in members if _stem(m[0]) not in own]) + _apart(key, members, own)
    if "" in texts and len(photos) == 1 and not photos & texts:  # `a.image.jpg, a.txt`
        (stem,) = photos
        return _unique(
            key, [(_ending(name) if _stem(name) == stem else name, part) for name, part in members]
        )
    own = photos & texts if "" in texts else photos
    rest = [member for member in members if _stem(member[0]) not in own]
    shared = sorted(photos - own)
    if shared:
        problem = f"{key} has one text for {len(shared)} photos ({some(shared)}); give each photo a text of its own name"
        samples = [replace(sample, problem=problem) for sample in _apart(key, members, shared)]
    else:
        samples = _unique(key, rest) if any(_is_text(name) for name, _ in rest) else []
    return samples + _apart(key, members, own)


def _apart(key: str, members: _Members, stems: Collection[str]) -> list[Sample]:
    """One sample for each of these longer names."""
    samples = []
    for stem in sorted(stems):
        inner = [(_ending(name), part) for name, part in members if _stem(name) == stem]
        samples += _unique(f"{key}.{stem}", inner)
    return samples


def _unique(key: str, members: _Members) -> list[Sample]:
    """The sample of these files. If a file occurs twice: one sample per photo, with a reason why it is unusable."""
    counts = Counter(name for name, _ in members if name in _PHOTOS or (_is_text(name) and not _stem(name)))
    twice = [part.name for name, part in members if counts[name] > 1]
    if not twice:
        return [Sample(key, dict(members))]
    problem = (
        f"{twice[0]} is there {twice.count(twice[0])} times in the shard, so its files cannot be told apart; give every sample "
        "a name of its own"
    )
    photos = [(name, part) for name, part in members if name in _PHOTOS]
    return [Sample(key, {name: part}, problem) for name, part in photos or members[:1]]


def _whole(samples: list[Sample], broken: str, is_sorted: bool) -> tuple[list[Sample], int]:
    """The samples unaffected by damage, and the number of affected ones."""
    key, ending = _split(broken)
    cut = {key, f"{key}.{_stem(ending)}"} if broken else set()
    if not is_sorted:
        kinds = samples[0].parts.keys()
        whole = [sample for sample in samples if sample.key not in cut and sample.parts.keys() == kinds]
        return whole, len(samples) - len(whole)
    last = samples[-1]
    if last.key in cut or len(samples) > 1 and last.parts.keys() != samples[-2].parts.keys():
        return samples[:-1], 1
    return samples, 0


def _ending(name: str) -> str:
    """The extension of a name; for a text named after a photo, with the photo's (jpg.txt)."""
    stem, _, ending = name.rpartition(".")
    photo = stem.rpartition(".")[2]
    return f"{photo}.{ending}" if ending in _TEXTS and photo in _PHOTOS else ending


def _stem(name: str) -> str:
    return name[: -len(_ending(name))].removesuffix(".") if _ending(name) else name.removesuffix(".")


def _is_text(name: str) -> bool:
    return name.rpartition(".")[2] in _TEXTS
