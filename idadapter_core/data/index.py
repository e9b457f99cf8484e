"""The index: every photo that was seen, with what is known of it, and whether it may be used.

On disk it is JSON Lines. The first line holds facts about all of it, then comes one row a line. The recogniser's embeddings of
all rows are in a safetensors file beside it, whose name carries their digest: so the two files always belong together, and a
new index replaces an old one in one step.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, InputError
from ..faces.images import Image
from ..faces.iresnet import EMBEDDING_WIDTH
from ..files import read_safetensors, some, state_digest, write_lines, write_safetensors
from .photos import decode
from .texts import read_file

VERSION = 1
OK = "ok"
STATUSES = (
    OK,
    "no_face",
    "many_faces",
    "small_face",
    "blur",
    "extreme_pose",
    "corrupt",
    "too_small",
    "id_mismatch",
    "duplicate",
)
SPLITS = ("train", "test", "")
CLASS_NOUNS = ("man", "woman", "person")
IN_SHARD = "::"
"""Between a shard's path and a sample's key in `Row.source`."""
_EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True)
class Row:
    """A photo. What a scan could not find out has its default."""

    number: int  # its place in the index, from 0; never changes, so it names the sample
    source: str  # posix path relative to the index's root (or an absolute one), or "shard.tar::key"
    sha256: str = ""  # of the photo's bytes
    width: int = 0  # pixels, upright
    height: int = 0
    identity: str = ""  # who it is; "" where nobody said
    caption: str = ""
    class_noun: str = "person"  # man, woman or person
    box: tuple[float, float, float, float] | None = (
        None  # of the largest face: x1, y1, x2, y2 in upright pixels
    )
    landmarks: tuple[tuple[float, float], ...] | None = (
        None  # (5, 2) eyes, nose, mouth corners, in upright pixels
    )
    score: float = 0.0  # the detector's confidence, 0..1
    faces: int = 0  # how many were found
    face_fraction: float = 0.0  # share of the picture that the box covers
    yaw: float = 0.0  # degrees; see faces.pose
    pitch: float = 0.0
    sharpness: float = 0.0  # variance of the Laplacian of the aligned crop
    phash: str = ""  # perceptual hash, 64 bits as 16 hex digits
    split: str = ""  # train or test; "" for rows that are not used
    status: str = OK
    reason: str = ""  # why it is not ok
    offset: int = 0  # where its bytes begin in the shard; 0: a file of its own
    size: int = 0  # how many bytes it has


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


@dataclass(frozen=True, eq=False)
class Index:
    """An index on disk, read whole."""

    path: Path
    root: Path  # what relative sources start from
    rows: tuple[Row, ...]
    facts: Mapping[str, Any]  # version, recogniser's digest, limits, split, ...
    digest: str  # first 16 hex digits of the SHA-256 of the file

    def usable(self, split: str | None = None) -> list[Row]:
        """The rows that are ok, of one split or of all."""
        return [row for row in self.rows if row.status == OK and split in (None, row.split)]

    def counts(self) -> dict[str, int]:
        """How many rows have each status, in the order of STATUSES, zeros included. They sum to the number of rows."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in STATUSES}

    def bad_share(self) -> float:
        """The share of rows that cannot be used, duplicates aside."""
        counts = self.counts()
        return 1 - (counts[OK] + counts["duplicate"]) / len(self.rows) if self.rows else 0.0

    def load(self, row: Row) -> Image:
        """A row's photo (H, W, 3), RGB uint8, upright, transparency on white.

        Raises:
            InputError: the file is missing, has changed since the scan, or cannot be decoded.
        """
        try:
            return decode(self.read(row))
        except InputError as error:
            raise InputError(
                f"{self.root / row.source} (row {row.number} of {self.path.name}): {error}"
            ) from error

    def read(self, row: Row) -> bytes:
        """A row's photo as it is stored, one seek and one read even in a shard.

        Raises:
            InputError: the file is missing or has changed since the scan.
        """
        try:
            content = read_photo(self.root, row.source, row.offset, row.size)
        except OSError as error:
            raise InputError(
                f"cannot be read ({error.strerror or error}). Bring {'the file' if self.root.is_dir() else f'the folder {self.root}'} "
                "back, or scan again."
            ) from error
        if hashlib.sha256(content).hexdigest() != row.sha256:
            raise InputError("the file has changed since the scan. Bring the old one back, or scan again.")
        return content

    def embeddings(self) -> Tensor:
        """What the scan's recogniser made of each row's face (rows, 512), fp32, not normalised; zeros where there is no face.

        Raises:
            ConfigError: the file beside the index is missing or not the one that belongs to it.
        """
        path = self.path.with_name(embeddings_name(self.path, str(self.facts[_EMBEDDINGS])))
        try:
            tensor = read_safetensors(path)[0][_EMBEDDINGS]
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ConfigError(
                f"{path}: the embeddings of {self.path.name} cannot be read ({error}). The file belongs beside the index; bring it "
                "back, or scan again."
            ) from error
        if tuple(tensor.shape) != (len(self.rows), EMBEDDING_WIDTH) or tensor.dtype != torch.float32:
            raise ConfigError(
                f"{path}: holds {tuple(tensor.shape)} {tensor.dtype}, but {self.path.name} needs "
                f"({len(self.rows)}, {EMBEDDING_WIDTH}) torch.float32. Scan again."
            )
        return tensor


def read_photo(root: Path, source: str, offset: int, size: int) -> bytes:
    """The bytes of a photo, in a file of its own or within a shard. Raises OSError."""
    if not offset:
        return read_file(root / source)
    with (root / source.rpartition(IN_SHARD)[0]).open("rb") as shard:
        shard.seek(offset)
        content = shard.read(size)
    if len(content) != size:
        raise OSError(f"the shard ends {size - len(content)} bytes too early")
    return content


def read_index(path: str | Path) -> Index:
    """Read an index strictly: what is there must be complete and make sense.

    Raises:
        ConfigError: names the file, the line and what is wrong with it.
    """
    path = Path(path)
    digest = hashlib.sha256()
    rows: list[Row] = []
    facts: Mapping[str, Any] | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                digest.update(line)
                if facts is None:
                    facts = _facts(path, line)
                else:
                    rows.append(_row(f"{path.name} line {number + 1}", line, len(rows)))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Name the index that "
            "`python -m idadapter_core scan` wrote."
        ) from error
    if facts is None:
        raise ConfigError(f"{path} is empty, so it is no index. Scan again.")
    if len(rows) != facts["rows"]:
        raise ConfigError(
            f"{path}: has {len(rows)} rows, but its first line says {facts['rows']}; it was cut off or edited. Scan again."
        )
    return Index(path, _root(path, facts["root"]), tuple(rows), facts, digest.hexdigest()[:16])


def write_index(
    path: str | Path, root: Path, rows: Sequence[Row], embeddings: Tensor, facts: Mapping[str, Any]
) -> Index:
    """Write an index and the embeddings beside it. Whatever interrupts it, an older index of that name stays whole.

    Args:
        root: folder that relative sources start from. Stored relative to the index where one lies in the other's folder, so
            that both can be moved together; else as an absolute path.
        embeddings: (rows, 512), zeros where there is no face.
        facts: what else the first line says; plain values. Its `version`, `root`, `rows` and `embeddings` are those of this index.

    Raises:
        ConfigError: rows that make no sense, or a folder that cannot be written.
    """
    path = Path(path)
    if tuple(embeddings.shape) != (len(rows), EMBEDDING_WIDTH):
        raise ConfigError(
            f"{len(rows)} rows need embeddings ({len(rows)}, {EMBEDDING_WIDTH}), got {tuple(embeddings.shape)}"
        )
    stored = embeddings.detach().to(torch.float32).contiguous()
    name = state_digest({_EMBEDDINGS: stored})
    own: dict[str, Any] = {
        "version": VERSION,
        "root": _stored_root(path, root),
        "rows": len(rows),
        _EMBEDDINGS: name,
    }
    first = {**own, **{key: value for key, value in facts.items() if key not in own}}
    digest = hashlib.sha256()

    def lines() -> Iterator[bytes]:
        for content in (first, *map(_as_dict, rows)):
            line = (
                json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
            ).encode("utf-8", "surrogatepass")
            if content is not first:
                _row(f"row {content['number']}", line, int(content["number"]))
            digest.update(line)
            yield line

    for position, row in enumerate(rows):
        if row.number != position:
            raise ConfigError(f"row {position} has the number {row.number}; rows are numbered from 0")
    beside = path.with_name(embeddings_name(path, name))
    try:
        write_safetensors({_EMBEDDINGS: stored}, {}, beside)
        write_lines(path, lines())
    except CheckpointError as error:  # names the file, and says what helps
        raise ConfigError(f"{error}") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error}). Choose another folder, or free some space."
        ) from error
    for old in path.parent.glob(f"{glob.escape(path.stem)}.{'?' * len(name)}.safetensors"):
        if old != beside:
            old.unlink(missing_ok=True)
    return Index(path, _root(path, own["root"]), tuple(rows), first, digest.hexdigest()[:16])


def embeddings_name(path: Path, digest: str) -> str:
    """The name of the embeddings' file of an index."""
    return f"{path.stem}.{digest}.safetensors"


def _as_dict(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in FIELDS}


def _stored_root(path: Path, root: Path) -> str:
    folder, root = _absolute(path.parent), _absolute(root)
    if root.is_relative_to(folder) or folder.is_relative_to(root):
        return Path(os.path.relpath(root, folder)).as_posix()
    return root.as_posix()


def _root(path: Path, stored: str) -> Path:
    return _absolute(path.absolute().parent / PurePosixPath(stored))


def _absolute(path: Path) -> Path:
    """Without `..`, but with links as they are: they are how people move datasets between disks."""
    return Path(os.path.normpath(path.absolute()))


def _facts(path: Path, line: bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(line)
    except ValueError:
        facts = None
    wanted = {"version": int, "root": str, "rows": int, _EMBEDDINGS: str}
    if not isinstance(facts, dict) or any(type(facts.get(key)) is not kind for key, kind in wanted.items()):
        raise ConfigError(
            f"{path}: its first line is not that of an index. Name the file that "
            "`python -m idadapter_core scan` wrote."
        )
    if facts["version"] != VERSION:
        raise ConfigError(
            f"{path}: is of version {facts['version']}, this program reads version {VERSION}. Scan again."
        )
    return facts


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return type(value) is str


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: type(value) in (list, tuple) and len(value) == count and all(map(_number, value))


def _hex(digits: int) -> Callable[[Any], bool]:
    pattern = re.compile(f"([0-9a-f]{{{digits}}})?")
    return lambda value: type(value) is str and pattern.fullmatch(value) is not None


_pair, _box = _numbers(2), _numbers(4)
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "number": (_count, "a whole number"),
    "source": (lambda value: _text(value) and bool(value), "a path"),
    "sha256": (_hex(64), "64 hex digits"),
    "width": (_count, "a whole number"),
    "height": (_count, "a whole number"),
    "identity": (_text, "a text"),
    "caption": (_text, "a text"),
    "class_noun": (lambda value: value in CLASS_NOUNS, f"one of {', '.join(CLASS_NOUNS)}"),
    "box": (lambda value: value is None or _box(value), "four numbers or null"),
    "landmarks": (
        lambda value: (
            value is None or (type(value) in (list, tuple) and len(value) == 5 and all(map(_pair, value)))
        ),
        "five pairs of numbers or null",
    ),
    "score": (_number, "a number"),
    "faces": (_count, "a whole number"),
    "face_fraction": (_number, "a number"),
    "yaw": (_number, "a number"),
    "pitch": (_number, "a number"),
    "sharpness": (_number, "a number"),
    "phash": (_hex(16), "16 hex digits"),
    "split": (lambda value: value in SPLITS, "train, test or empty"),
    "status": (lambda value: value in STATUSES, f"one of {', '.join(STATUSES)}"),
    "reason": (_text, "a text"),
    "offset": (_count, "a whole number"),
    "size": (_count, "a whole number"),
}


def _row(where: str, line: bytes, number: int) -> Row:
    try:
        content = json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ConfigError(
            f"{where} is no JSON ({error}); the index was cut off or edited. Scan again."
        ) from error
    if not isinstance(content, dict) or content.keys() != _KINDS.keys():
        keys = content.keys() if isinstance(content, dict) else set()
        missing, unknown = _KINDS.keys() - keys, keys - _KINDS.keys()
        parts = [
            f"{word} {some(sorted(names))}"
            for word, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise ConfigError(f"{where} {' and '.join(parts)}. Scan again with this version.")
    for key, (check, kind) in _KINDS.items():
        if not check(content[key]):
            raise ConfigError(f"{where}: {key} must be {kind}, got {content[key]!r}. Scan again.")
    if content["box"] is not None:
        content["box"] = tuple(content["box"])
    if content["landmarks"] is not None:
        content["landmarks"] = tuple(tuple(point) for point in content["landmarks"])
    row = Row(**content)
    if problem := _contradiction(row, number):
        raise ConfigError(f"{where}: {problem}. Scan again.")
    return row


def _contradiction(row: Row, number: int) -> str:
    """What does not fit together in a row; empty when all does."""
    if row.number != number:
        return f"number must be {number}, got {row.number}"
    if row.status != OK:
        return "" if row.reason else f"a row that is {row.status} needs a reason"
    if row.reason:
        return f"a row that is ok has no reason, got {row.reason!r}"
    for name in ("sha256", "width", "height", "box", "landmarks"):
        if not getattr(row, name):
            return f"a row that is ok needs {name}"
    return ""
