"""Intermediate results of a scan, in a folder next to the index: one file per process.

Each line is a photo. A process killed in the middle of a line does not spoil the file. A result is valid while the photo's file has the
same size and modification time, whichever process wrote it and however many there were.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .entries import ListedPhoto
from .index import IN_SHARD
from .measure import Measured
from .ranks import ALONE, Ranks

log = logging.getLogger(__name__)

_SYNC_SECONDS = 1.0
_FILE = 40  # bits of a place within a file; the file's number is in the bits above

Embedding = NDArray[np.float32]
Finding = tuple[Measured, Embedding | None]
_Key = tuple[str, int]  # source and offset: a damaged shard may hold a key twice


def progress_path(output: Path) -> Path:
    """The folder of a scan's intermediate results."""
    return output.with_name(f"{output.name}.progress")


class Progress:
    """Intermediate results for some photos. They stay on disk; only their places are in memory.

    Args:
        photos: photos to scan, by any process, that this process must know of.
        settings: everything that results depend on; results with other settings are ignored.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        photos: Sequence[ListedPhoto],
        root: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = progress_path(output)
        self._own = self.folder / f"rank-{ranks.rank:05}.jsonl"
        self._settings = json.loads(json.dumps(settings))
        self._root = root
        self._number: dict[_Key, int] = {}
        self._unique: list[ListedPhoto] = []  # a photo may be listed twice
        for photo in photos:
            if self._number.setdefault(_key(photo), len(self._number)) == len(self._unique):
                self._unique.append(photo)
        self._places = np.full(len(self._number), -1, np.int64)  # of each photo's result
        self._readers: dict[Path, _Reader] = {}
        self._files: list[BinaryIO | None] = []
        self._names: list[Path] = []
        self._synced = time.monotonic()

    def __enter__(self) -> Progress:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._own.open("r+b" if self._own.exists() else "w+b")
            whole = self._open_own()
            self._file.truncate(whole)
            self._file.seek(whole)
            self._end = whole
            if not whole:
                self._write(self._settings)
            self.read_others()
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror or error}). Choose another folder for the index."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # all complete lines were already flushed
            self._file.close()
        self._close()

    def _close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()
        self._files = [None] * len(self._files)

    def knows(self, photo: ListedPhoto) -> bool:
        """Whether this photo was scanned and has not changed since."""
        return bool(self._places[self._number[_key(photo)]] >= 0)

    @property
    def left(self) -> int:
        """Number of photos not scanned yet."""
        return int((self._places < 0).sum())

    def first_left(self) -> list[str]:
        """Sources of some photos not scanned yet."""
        return [self._unique[number].source for number in np.flatnonzero(self._places < 0)[:4]]

    def finding(self, photo: ListedPhoto) -> Finding:
        """The result of a scanned photo."""
        number, offset = divmod(int(self._places[self._number[_key(photo)]]), 1 << _FILE)
        file = self._files[number]
        if file is None:
            file = self._files[number] = self._names[number].open("rb")
        file.seek(offset)
        entry = json.loads(file.readline())
        facts = dict(entry["facts"])
        if facts["box"] is not None:
            facts["box"] = tuple(facts["box"])
            facts["landmarks"] = tuple(tuple(point) for point in facts["landmarks"])
        text = entry["embedding"]
        embedding = None if text is None else np.frombuffer(base64.b64decode(text), "<f4").copy()
        return Measured(**facts), embedding

    def add(self, photo: ListedPhoto, finding: Finding) -> None:
        """Save the result of a photo."""
        found, embedding = finding
        text = None if embedding is None else base64.b64encode(embedding.astype("<f4").tobytes()).decode()
        content = {
            "photo": _key(photo),
            "stamp": _stamp(photo, self._root),
            "facts": asdict(found),
            "embedding": text,
        }
        place = self._end
        self._write(content)
        self._places[self._number[_key(photo)]] = self._file_number(self._own) << _FILE | place

    def read_others(self) -> None:
        """Read new results of other processes and of earlier scans."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            if path != self._own:
                reader = self._readers.setdefault(path, _Reader(path, self._settings))
                for offset, entry in reader.lines():
                    self._take(path, offset, entry)

    def forget(self) -> None:
        """Delete the folder, after the index is written."""
        self._file.close()
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open_own(self) -> int:
        """Read this process's results of an earlier scan. Returns the number of intact bytes; 0: start from scratch."""
        reader = _Reader(self._own, self._settings)
        for offset, entry in reader.lines():
            self._take(self._own, offset, entry)
        if reader.is_of_others:
            log.warning(
                "%s is of other face models or of another version; all photos are scanned again", self._own
            )
        return reader.read

    def _take(self, path: Path, offset: int, entry: Mapping[str, Any]) -> None:
        source, place = entry["photo"]
        number = self._number.get((source, place))
        if number is None:
            return
        if entry["stamp"] == _stamp(self._unique[number], self._root):
            self._places[number] = self._file_number(path) << _FILE | offset

    def _file_number(self, path: Path) -> int:
        if path not in self._names:
            self._names.append(path)
            self._files.append(None)
        return self._names.index(path)

    def _write(self, content: Mapping[str, Any]) -> None:
        line = (json.dumps(content, separators=(",", ":")) + "\n").encode()
        try:
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise ConfigError(
                f"{self._own}: cannot be written ({error.strerror}). Free some space and give the same command again; what was "
                "found so far is kept."
            ) from error
        self._end += len(line)


class _Reader:
    """Reads the complete lines of a growing file, each once."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, settings
        self.read = 0  # bytes
        self.is_of_others = False

    def lines(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Positions and contents of new lines except the first; nothing if the first line has other settings."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = json.loads(line)
                    if self.read == 0:
                        self.is_of_others = entry != self._settings
                        if self.is_of_others:
                            return
                    else:
                        _require_finding(entry)
                        yield self.read, entry
                except (ValueError, KeyError, TypeError):
                    return  # left by a power failure
                self.read += len(line)


def _require_finding(entry: Any) -> None:
    """Raise ValueError, KeyError or TypeError if an entry is not a result."""
    source, offset = entry["photo"]
    Measured(**entry["facts"])
    if not isinstance(source, str) or not isinstance(offset, int) or not isinstance(entry["stamp"], list):
        raise TypeError("no finding")
    base64.b64decode(entry["embedding"] or "", validate=True)


def _key(photo: ListedPhoto) -> _Key:
    return photo.source, photo.offset


def _stamp(photo: ListedPhoto, root: Path) -> list[int]:
    """Changes with the photo's file: size, modification time, and position in a shard."""
    path = root / (photo.source.rpartition(IN_SHARD)[0] if photo.offset else photo.source)
    try:
        facts = path.stat()
    except (OSError, ValueError):  # a NUL in a name
        return []
    return [facts.st_size, facts.st_mtime_ns, photo.offset, photo.size]
