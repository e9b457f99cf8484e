"""The index of a dataset: every photo seen, the facts known about it, and whether it can be used.

On disk, it is a Parquet file with one row per photo (see `parquet`). Next to it are a safetensors file with the recogniser's
embeddings of all rows, and a memory map of the rows shared by all processes of a machine (see `memory_map`). Both file names include
a digest, so the files always belong together, and a new index replaces an old one in one step.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..faces.images import Image
from ..faces.iresnet import EMBEDDING_WIDTH
from ..files import StreamedTensors, read_safetensors, replacing, state_digest
from .columns import batch_of
from .memory_map import map_path, mapped_rows
from .parquet import SUFFIX, VERSION, Head, read_head, write_parquet
from .photos import decode
from .rows import BATCH, CLASS_NOUNS, FIELDS, OK, SPLITS, STATUSES, Packed, Row, Rows, as_rows, in_batches
from .texts import read_file

IN_SHARD = "::"
"""Separates a shard's path and a sample's key in `Row.source`."""
CONVERTED = "converted_from"
"""Fact that holds the digest of the JSON Lines index that this one was converted from."""
_EMBEDDINGS = "embeddings"
_USED = STATUSES.index(OK)
_DIGITS = "?" * 16


@dataclass(frozen=True, eq=False)
class Index:
    """An index on disk. Its rows are memory-mapped (see `memory_map`); rows passed to the constructor are packed in memory."""

    path: Path
    root: Path  # base folder of relative sources
    rows: Rows
    facts: Mapping[str, Any]  # version, recogniser's digest, limits, split, ...
    digest: str  # 16 hex digits of the facts and the rows; a converted index keeps its earlier digest

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", as_rows(self.rows))

    def usable(self, split: str | None = None) -> Rows:
        """The rows with status ok, of one split or of all."""
        chosen = self.rows.status == _USED
        return self.rows.where(chosen if split is None else chosen & (self.rows.split == SPLITS.index(split)))

    def counts(self) -> dict[str, int]:
        """Number of rows per status, in the order of STATUSES, zeros included. They sum to the number of rows."""
        found = np.bincount(self.rows.status, minlength=len(STATUSES)).tolist()
        return dict(zip(STATUSES, found, strict=True))

    def bad_share(self) -> float:
        """Share of unusable rows, not counting duplicates."""
        counts = self.counts()
        return 1 - (counts[OK] + counts["duplicate"]) / len(self.rows) if self.rows else 0.0

    def load(self, row: Row) -> Image:
        """Load a row's photo (H, W, 3), RGB uint8, upright, transparency on white.

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
        """Read a row's photo as stored. One seek and one read, even in a shard.

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
        """The scan's face embeddings of all rows (rows, 512), fp32, not normalised; zeros for rows without a face.

        Memory-mapped and read-only.

        Raises:
            ConfigError: the embeddings file is missing or does not belong to this index.
        """
        return read_embeddings(self.path, self.facts)


def read_embeddings(path: Path, facts: Mapping[str, Any]) -> Tensor:
    """Open the embeddings of an index with these facts, see `Index.embeddings`."""
    beside = path.with_name(embeddings_name(path, str(facts[_EMBEDDINGS])))
    try:
        tensor = read_safetensors(beside, mapped=True)[0][_EMBEDDINGS]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{beside}: the embeddings of {path.name} cannot be read ({error}). The file belongs beside the index; bring it "
            "back, or scan again."
        ) from error
    wanted = (facts["rows"], EMBEDDING_WIDTH)
    if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
        raise ConfigError(
            f"{beside}: holds {tuple(tensor.shape)} {tensor.dtype}, but {path.name} needs {wanted} torch.float32. Scan again."
        )
    return tensor


def read_photo(root: Path, source: str, offset: int, size: int) -> bytes:
    """Read the bytes of a photo, from its own file or a shard. Raises OSError."""
    if not offset:
        return read_file(root / source)
    with (root / source.rpartition(IN_SHARD)[0]).open("rb") as shard:
        shard.seek(offset)
        content = shard.read(size)
    if len(content) != size:
        raise OSError(f"the shard ends {size - len(content)} bytes too early")
    return content


def read_index(path: str | Path) -> Index:
    """Open an index. Rows are validated when an index is written, and again when its map is rebuilt.

    Raises:
        ConfigError: names the file, the row and what is wrong with it; or pyarrow is not installed.
    """
    path = Path(path)
    head = read_head(path)
    return _opened(path, head, mapped_rows(path, head))


def _opened(path: Path, head: Head, packed: Packed) -> Index:
    facts = dict(head.facts)
    digest = str(facts.pop(CONVERTED, head.digest))  # must not be passed on to an index made from this one
    return Index(path, root_of(path, facts["root"]), Rows(packed), facts, digest)


def write_index(
    path: str | Path, root: Path, rows: Iterable[Row], embeddings: Tensor, facts: Mapping[str, Any]
) -> Index:
    """Write an index, its embeddings and its map. If interrupted, an older index of that name stays intact.

    Rows and embeddings are processed in batches and need not fit in memory.

    Args:
        path: .parquet
        root: base folder of relative sources. Stored relative to the index if one is inside the other's folder, so that both can
            be moved together; otherwise as an absolute path.
        rows: numbered from 0.
        embeddings: (rows, 512), zeros where there is no face.
        facts: further plain values about the whole index. `version`, `root`, `rows` and `embeddings` are overwritten.

    Raises:
        ConfigError: invalid rows, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ConfigError(f"the index must end in {SUFFIX}, got {path.name}")
    count = len(embeddings)
    if embeddings.shape[1:] != (EMBEDDING_WIDTH,):
        raise ConfigError(
            f"embeddings must be (rows, {EMBEDDING_WIDTH}), got {tuple(embeddings.shape)}; choose another recogniser"
        )
    stored = embeddings.detach().to(torch.float32).contiguous()
    name = state_digest({_EMBEDDINGS: stored})
    own: dict[str, Any] = {
        "version": VERSION,
        "root": _stored_root(path, root),
        "rows": count,
        _EMBEDDINGS: name,
    }
    plain = json.loads(json.dumps({**own, **{key: value for key, value in facts.items() if key not in own}}))
    try:
        _write_embeddings(path.with_name(embeddings_name(path, name)), stored)
        with replacing(path) as temporary:
            head = write_parquet(temporary, _batches(rows, count), plain)
            packed = mapped_rows(temporary, head, path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}). Choose another folder, or free some space."
        ) from error
    _forget_others(path, name, head.digest)
    return _opened(path, head, packed)


def draft_rows(path: Path, rows: Iterable[Row], count: int) -> Rows:
    """Write rows to a file and map them from there, for an index that is not written yet. Raises OSError."""
    head = write_parquet(
        path, _batches(rows, count), {"version": VERSION, "root": "", "rows": count, _EMBEDDINGS: ""}
    )
    return Rows(mapped_rows(path, head, path))


def _batches(rows: Iterable[Row], count: int) -> Iterator[Any]:
    """Record batches of the rows; their number must be `count`."""
    first = 0
    for batch in in_batches(rows):
        if first + len(batch) <= count:
            yield batch_of(batch, first)
        first += len(batch)
    if first != count:
        raise ConfigError(
            f"{first} rows need embeddings ({first}, {EMBEDDING_WIDTH}), got ({count}, {EMBEDDING_WIDTH})"
        )


def _write_embeddings(path: Path, embeddings: Tensor) -> None:
    shapes = {_EMBEDDINGS: ("F32", tuple(embeddings.shape))}
    with replacing(path) as temporary, StreamedTensors(temporary, shapes) as file:
        for first in range(0, len(embeddings), BATCH):
            file.add(_EMBEDDINGS, embeddings[first : first + BATCH].numpy())


def _forget_others(path: Path, embeddings: str, digest: str) -> None:
    """Delete the files of an older index of that name. Windows does not allow it while they are open."""
    kept = {path.with_name(embeddings_name(path, embeddings)), map_path(path, digest)}
    for kind in ("safetensors", "map"):
        for old in path.parent.glob(f"{glob.escape(path.stem)}.{_DIGITS}.{kind}"):
            if old not in kept:
                with contextlib.suppress(OSError):
                    old.unlink()


def embeddings_name(path: Path, digest: str) -> str:
    """File name of an index's embeddings."""
    return f"{path.stem}.{digest}.safetensors"


def _stored_root(path: Path, root: Path) -> str:
    folder, root = _absolute(path.parent), _absolute(root)
    if root.is_relative_to(folder) or folder.is_relative_to(root):
        return Path(os.path.relpath(root, folder)).as_posix()
    return root.as_posix()


def root_of(path: Path, stored: str) -> Path:
    """Base folder of an index's relative sources."""
    return _absolute(path.absolute().parent / PurePosixPath(stored))


def _absolute(path: Path) -> Path:
    """Resolve `..` but not links: people use links to move datasets between disks."""
    return Path(os.path.normpath(path.absolute()))


__all__ = [
    "CLASS_NOUNS",
    "CONVERTED",
    "FIELDS",
    "IN_SHARD",
    "OK",
    "SPLITS",
    "STATUSES",
    "Index",
    "Row",
    "Rows",
    "draft_rows",
    "embeddings_name",
    "read_embeddings",
    "read_index",
    "read_photo",
    "root_of",
    "write_index",
]
