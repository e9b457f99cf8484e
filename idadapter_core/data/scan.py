"""Looking at every photo of a dataset once: faces, quality, embeddings; from this the index.

What is expensive (decoding, faces, embeddings) is written to a progress file beside the index as it is found, so a scan that was
interrupted in any way goes on where it was. Verdicts, mismatches and the split are made at the end, from all of it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, InputError
from ..faces.iresnet import EMBEDDING_WIDTH
from ..files import some
from ..waiting import PATIENCE, ignore_signals, kill_children, reason_of_death
from .entries import Photo
from .index import IN_SHARD, OK, Index, Row, write_index
from .measure import Limits, Measured, Models, judge, measure
from .people import by_person
from .photos import codecs
from .sources import Source
from .split import SplitSettings, split_rows

log = logging.getLogger(__name__)

MIN_PHOTOS = 3
"""Of a person; with fewer, the median embedding says nothing."""
_PROGRESS_VERSION = 2
_SYNC_SECONDS = 1.0
_AHEAD = 4  # photos handed out to each worker before its results are back
_NOUNS = {"M": "man", "F": "woman"}

Embedding = NDArray[np.float32]
Finding = tuple[Measured, Embedding | None]
_Key = tuple[str, int]  # source and offset: a damaged shard may hold one key twice


@dataclass(frozen=True)
class Looker:
    """What a process needs to look at photos."""

    root: Path
    package: Path
    recognizer: Path | None
    provider: str

    def open(self) -> Models:
        return Models(self.package, self.recognizer, self.provider)


def scan(
    source: Source,
    output: Path,
    *,
    package: Path,
    recognizer: Path | None = None,
    provider: str = "auto",
    limits: Limits | None = None,
    split: SplitSettings | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Look at all photos of a source and write their index. Its bytes depend neither on `workers` nor on interruptions.

    Args:
        output: the index, .jsonl. While the scan runs, what is known so far is in a file beside it; the same call goes on from there.
        package: folder of an insightface package (buffalo_l, antelopev2).
        recognizer: a torch IResNet file that gives the embeddings in place of the package's own recogniser.
        provider: of onnxruntime, see `faces.detector.open_analyzer`.
        workers: processes that look at photos; 0: this one does.
        progress: is told how many photos are done, of how many.

    Raises:
        FacePackageError, RecognizerError: the networks cannot be opened.
        ConfigError: the index cannot be written.
        InputError: a worker process died.
    """
    limits = limits or Limits()
    looker = Looker(source.root, package, recognizer, provider)
    with _single_thread():
        models = looker.open()
        facts = models.facts()
        # A photo whose text cannot be read is not looked at: the text may be mended when the same photo comes again.
        fine = [photo for photo in source.photos if not photo.problem]
        with _Progress(output, {"version": _PROGRESS_VERSION, "codecs": codecs(), **facts}) as known:
            waiting = [photo for photo in fine if not known.restore(photo, source.root)]
            done = len(source.photos) - len(waiting)
            before = len(fine) - len(waiting)
            if before:
                log.info("%d of %d photos were looked at before", before, len(source.photos))
            progress(done, len(source.photos))
            for photo, finding in _look(waiting, looker, models, workers):
                known.add(photo, source.root, finding)
                done += 1
                progress(done, len(source.photos))
            findings = [
                measure(photo, source.root, models) if photo.problem else known.findings[_key(photo)]
                for photo in source.photos
            ]
    rows = [
        _row(number, photo, found, limits)
        for number, (photo, (found, _)) in enumerate(zip(source.photos, findings, strict=True))
    ]
    embeddings = torch.zeros(len(rows), EMBEDDING_WIDTH)
    for number, (_, embedding) in enumerate(findings):
        if embedding is not None:
            embeddings[number] = torch.from_numpy(embedding)
    rows = find_mismatches(rows, embeddings, limits.min_cosine)
    rows, split_facts = split_rows(rows, embeddings, split or SplitSettings())
    index = write_index(
        output,
        source.root,
        rows,
        embeddings,
        {
            "layout": source.layout,
            **facts,
            "limits": asdict(limits),
            "split": split_facts,
            "files": source.files.facts(),
            "notes": [*source.notes, *_notes(source.photos, findings)],
        },
    )
    _progress_path(output).unlink(missing_ok=True)
    return index


def find_mismatches(rows: Sequence[Row], embeddings: Tensor, least: float) -> list[Row]:
    """Mark photos that do not show the person that they are said to show: those whose embedding's cosine to the median of the
    person's photos is below `least`. People with fewer than three usable photos are left alone.
    """
    checked = list(rows)
    for photos in by_person(row for row in rows if row.status == OK and row.identity).values():
        if len(photos) < MIN_PHOTOS:
            continue
        numbers = [row.number for row in photos]
        directions = torch.nn.functional.normalize(embeddings[numbers], dim=1)
        median = torch.from_numpy(np.median(directions.numpy(), axis=0))
        median = torch.nn.functional.normalize(median, dim=0)
        for number, cosine in zip(numbers, (directions @ median).tolist(), strict=True):
            if cosine < least:
                reason = (
                    f"cosine {cosine:.2f} to the median of {len(numbers)} photos of {rows[number].identity}, "
                    f"at least {least:.2f} is needed"
                )
                checked[number] = replace(rows[number], status="id_mismatch", reason=reason)
    return checked


def _notes(photos: Sequence[Photo], findings: Sequence[Finding]) -> list[str]:
    """What was remarked about photos, each remark once with their number."""
    remarked: dict[str, list[str]] = {}
    for photo, (found, _) in zip(photos, findings, strict=True):
        if found.note:
            remarked.setdefault(found.note, []).append(photo.source)
    return [
        f"{len(sources)} of {len(photos)} photos: {note}; first: {sources[0]}"
        for note, sources in remarked.items()
    ]


def _row(number: int, photo: Photo, found: Measured, limits: Limits) -> Row:
    facts: dict[str, Any] = asdict(found)
    for name in ("rival", "sex", "status", "reason", "size", "note"):
        del facts[name]
    status, reason = judge(found, limits)
    return Row(
        number=number,
        source=photo.source,
        identity=photo.identity,
        caption=photo.caption,
        class_noun=photo.class_noun or _NOUNS.get(found.sex, "person"),
        status=status,
        reason=reason,
        offset=photo.offset,
        size=photo.size or found.size,
        **facts,
    )


# ---------------------------------------------------------------------------------------------------- who looks


def _look(
    photos: Sequence[Photo], looker: Looker, models: Models, workers: int
) -> Iterator[tuple[Photo, Finding]]:
    """Each photo with what was found, in any order."""
    if not workers:
        for photo in photos:
            yield photo, measure(photo, looker.root, models)
        return
    pool = ProcessPoolExecutor(
        workers,
        # Not forked: the runtime's threads do not survive it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(looker,),
    )
    others = multiprocessing.active_children()
    started: list[multiprocessing.process.BaseProcess] = []
    pending: dict[Future[Finding], Photo] = {}
    queue = iter(photos)
    try:
        while True:
            for photo in queue:
                with (
                    _interrupts_wait()
                ):  # a process that is started here would heed them before `_start_worker` runs
                    pending[pool.submit(_look_at, photo)] = photo
                if len(pending) >= workers * _AHEAD:
                    break
            if not pending:
                return
            started = started or [child for child in multiprocessing.active_children() if child not in others]
            done = wait(pending, PATIENCE, FIRST_COMPLETED).done
            if not done:
                raise InputError(
                    f"no photo was looked at for {PATIENCE:.0f} s: a worker is stuck at one of {_some_of(pending)}. Look at the disk that "
                    "they are on, then give the same command again: it goes on from where it was."
                )
            for future in done:
                finding = future.result()
                yield pending.pop(future), finding
    except BrokenProcessPool as error:
        raise InputError(
            f"a worker process died at one of {_some_of(pending)}: {_reason(started)}. Give the same command "
            "again, with fewer --workers if memory ran out: it goes on from where it was."
        ) from error
    finally:
        if pending:  # who leaves early waits for nobody: a worker may be stuck, and writes nothing
            kill_children(others)
        pool.shutdown(cancel_futures=True)


def _reason(workers: Sequence[multiprocessing.process.BaseProcess]) -> str:
    """How one of them died. The pool may be asking for its exit code at this moment, which the system tells only once."""
    for _ in range(100):
        if reason := reason_of_death(workers):
            return reason
        time.sleep(0.01)
    return "it left no exit code"


def _some_of(pending: Mapping[Future[Finding], Photo]) -> str:
    return some(photo.source for photo in pending.values())


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl+C is heard at the end of the block. Processes that are started in it never hear it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[Looker, Models] | None = None


def _start_worker(looker: Looker) -> None:
    global _worker
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    ignore_signals()
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
    _worker = looker, looker.open()


def _leave_with_parent() -> None:
    """A killed parent closes no queues, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _look_at(photo: Photo) -> Finding:
    assert _worker is not None
    looker, models = _worker
    return measure(photo, looker.root, models)


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------- progress


def _progress_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress")


class _Progress:
    """What a scan has found so far, in a file that a kill in the middle of a line does not spoil.

    Each line is a photo. It counts as long as the photo's file has the same size and time of change.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.findings: dict[_Key, Finding] = {}
        self._path = _progress_path(output)
        self._settings = json.loads(json.dumps(settings))
        self._stamps: dict[_Key, list[int]] = {}
        self._synced = time.monotonic()

    def __enter__(self) -> _Progress:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("r+b" if self._path.exists() else "w+b")
            whole = self._read()
            self._file.truncate(whole)
            self._file.seek(whole)
            if not whole:
                self._write(self._settings)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: cannot be written ({error.strerror}). Choose another folder for the index."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # every line was flushed; what a full disk refused is not in it
            self._file.close()

    def restore(self, photo: Photo, root: Path) -> bool:
        """Whether this photo was looked at before and has not changed since."""
        key = _key(photo)
        return key in self.findings and self._stamps[key] == _stamp(photo, root)

    def add(self, photo: Photo, root: Path, finding: Finding) -> None:
        found, embedding = finding
        self.findings[_key(photo)] = finding
        text = None if embedding is None else base64.b64encode(embedding.astype("<f4").tobytes()).decode()
        self._write(
            {
                "photo": _key(photo),
                "stamp": _stamp(photo, root),
                "facts": asdict(found),
                "embedding": text,
            }
        )

    def _write(self, content: Mapping[str, Any]) -> None:
        try:
            self._file.write((json.dumps(content, separators=(",", ":")) + "\n").encode())
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise ConfigError(
                f"{self._path}: cannot be written ({error.strerror}). Free some space and give the same command again; what was "
                "found so far is kept."
            ) from error

    def _read(self) -> int:
        """Take over what is there. Returns how many bytes of it are whole; 0: start anew."""
        whole = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 0:
                    if entry != self._settings:
                        log.warning(
                            "%s is of other face models or of another version; all photos are looked at again",
                            self._path,
                        )
                        return 0
                else:
                    self._take(entry)
            except (ValueError, KeyError, TypeError):
                break  # what a lost power supply left
            whole += len(line)
        return whole

    def _take(self, entry: Mapping[str, Any]) -> None:
        facts = dict(entry["facts"])
        if facts["box"] is not None:
            facts["box"] = tuple(facts["box"])
            facts["landmarks"] = tuple(tuple(point) for point in facts["landmarks"])
        text = entry["embedding"]
        embedding = None if text is None else np.frombuffer(base64.b64decode(text), "<f4").copy()
        source, offset = entry["photo"]
        self.findings[source, offset] = Measured(**facts), embedding
        self._stamps[source, offset] = entry["stamp"]


def _key(photo: Photo) -> _Key:
    return photo.source, photo.offset


def _stamp(photo: Photo, root: Path) -> list[int]:
    """Changes when the photo's file does: size and time of change, and its place in a shard."""
    path = root / (photo.source.rpartition(IN_SHARD)[0] if photo.offset else photo.source)
    try:
        facts = path.stat()
    except (OSError, ValueError):  # a NUL in a name
        return []
    return [facts.st_size, facts.st_mtime_ns, photo.offset, photo.size]
