"""The memory map of an index: its rows as `rows.Packed` arrays in a file next to the Parquet file.

Decoding the columns of a Parquet file takes memory in every process. All processes and loader workers of a machine share the one copy
of a map in the page cache, and opening six million rows costs as much as opening one. The map is written with the index, and rebuilt if
it is missing or belongs to another file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import ConfigError
from ..files import StreamedTensors, read_metadata, read_safetensors, replacing
from .columns import hash_into, packed, people_of
from .parquet import Head, batches_of, content_digest
from .rows import RECORD, Packed

log = logging.getLogger(__name__)

_VERSION = "1"  # a map of another version is rebuilt


@dataclass(frozen=True, eq=False)
class Mapped(Packed):
    """Packed rows in a mapped file."""

    path: Path

    def __reduce__(self) -> tuple[Callable[[Path], Mapped], tuple[Path]]:
        return open_map, (self.path,)  # a loader worker that is not forked maps the file itself


def open_map(path: Path) -> Mapped:
    """Map packed rows from a file. Raises OSError or SafetensorError."""
    tensors, _ = read_safetensors(path, mapped=True)
    arrays: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Mapped(
        arrays["records"].reshape(-1).view(RECORD),
        arrays["texts"],
        arrays["status"],
        arrays["split"],
        arrays["person"].view(np.uint32),
        path,
    )


def map_path(path: Path, digest: str) -> Path:
    """Path of the map of an index with this digest."""
    return path.with_name(f"{path.stem}.{digest}.map")


def mapped_rows(path: Path, head: Head, name: Path | None = None) -> Mapped:
    """Map the rows of an index from the file next to it, which is made if missing.

    Args:
        name: final name of a new index that is still being written under another one.

    Raises:
        ConfigError: the index is damaged, or the map cannot be written.
    """
    target = map_path(name or path, head.digest)
    stamp = _stamp(path, head)
    if not _is_of(target, stamp):
        try:
            with _only_one(target):
                if not _is_of(target, stamp):
                    if name is None:  # for an existing index, users do not expect this to take time
                        log.info("%s is missing and made anew, once for all processes", target)
                    write_map(path, target, head, stamp)
        except OSError as error:
            raise ConfigError(
                f"{target}: cannot be written ({error.strerror or error}). It is made once beside an index; free some space, or run "
                f"`python -m idadapter_core stats {path}` as somebody who may write there."
            ) from error
    try:
        return open_map(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{target}: cannot be read ({error}). Delete it: it is made again.") from error


def _stamp(path: Path, head: Head) -> dict[str, str]:
    """Identification of its index stored in a map. The end of a Parquet file has the sizes and ranges of all its content."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        footer = hashlib.sha256(file.read(length)).hexdigest()
    return {"map": _VERSION, "digest": head.digest, "footer": footer}


def _is_of(target: Path, stamp: Mapping[str, str]) -> bool:
    try:
        return read_metadata(target) == stamp
    except (OSError, safetensors.SafetensorError):
        return False


def write_map(path: Path, target: Path, head: Head, stamp: Mapping[str, str]) -> None:
    """Write the map of an index. Raises OSError, or ConfigError if the index does not match its header."""
    content = content_digest(head.facts)
    names: list[Any] = []
    texts = 0
    rows = head.facts["rows"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "person": ("I32", (rows,)),
        "records": ("U8", (rows, RECORD.itemsize)),
        "status": ("U8", (rows,)),
        "split": ("U8", (rows,)),
    }
    with replacing(target) as temporary, StreamedTensors(temporary, shapes, "texts", stamp) as file:
        for batch in batches_of(path):
            hash_into(content, batch)
            records, joined = packed(batch, texts)
            file.add("records", records)
            file.add("status", records["status"])
            file.add("split", records["split"])
            file.add("texts", joined)
            names.append(batch.column("identity"))
            texts += len(joined)
        if content.hexdigest()[:16] != head.digest:
            raise ConfigError(
                f"{path}: its rows are not those that were written (digest {content.hexdigest()[:16]}, it says {head.digest}); it was "
                "edited. Scan again."
            )
        file.add("person", people_of(names))


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Context manager: one process of a machine at a time, if the system has such locks; the others wait for it."""
    try:
        import fcntl
    except ImportError:  # Windows: each process makes the map, the last one stays
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
