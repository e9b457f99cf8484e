"""Scan a dataset: look at every photo once (faces, quality, embeddings) and write the index.

The expensive results (decoding, faces, embeddings) are saved in a folder next to the index as they are found, so an interrupted scan
continues where it was. Several processes, on one machine or many, may share the photos. One of them then makes the verdicts,
mismatches and split from all results.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..faces.iresnet import EMBEDDING_WIDTH
from ..files import StreamedTensors, read_safetensors, some
from ..waiting import WAIT_TIMEOUT, exit_with_parent, ignore_signals, kill_children, reason_of_death
from .entries import ListedPhoto
from .index import Index, draft_rows, write_index
from .measure import Limits, Measured, Models, judge, measure
from .people import People
from .photos import codecs
from .progress import Finding, Progress
from .ranks import Ranks, wait_for
from .rows import OK, STATUSES, Edited, Row, Rows
from .sources import Source
from .split import SplitSettings, split_rows

log = logging.getLogger(__name__)

MIN_PHOTOS = 3
"""Per person. With fewer photos, the median embedding is meaningless."""
_PROGRESS_VERSION = 3
_AHEAD = 4  # photos queued per worker
_NOUNS = {"M": "man", "F": "woman"}


@dataclass(frozen=True)
class ModelLoader:
    """Opens the networks, in this process or in a worker."""

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
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Scan all photos of a source and write their index.

    The index does not depend on `workers`, `world` or interruptions, down to the byte.

    Args:
        output: the index, .parquet. Results so far are in a folder next to it during the scan; the same call continues from there.
        package: folder of an insightface package (buffalo_l, antelopev2).
        recognizer: a torch IResNet file for the embeddings, instead of the package's own recogniser.
        provider: onnxruntime provider, see `faces.detector.open_analyzer`.
        workers: number of worker processes; 0: this process does the work.
        world: number of processes that share the photos. This one has rank 0 and waits for the others, which call `scan_share`.
        progress: callback (done, total), in photos.

    Raises:
        FacePackageError, RecognizerError: the networks cannot be opened.
        ConfigError: the index cannot be written.
        InputError: a worker process died, or the other processes make no progress.
    """
    limits = limits or Limits()
    loader = ModelLoader(source.root, package, recognizer, provider)
    ranks = Ranks(0, world)
    with _single_thread():
        models = loader.open()
        with _open_progress(output, models, source.photos, source.root, ranks) as known:
            _measure_share(known, source, ranks, loader, models, workers, progress)
            _wait_for_others(known, source, ranks, progress)
            index = _write(source, output, known, models, limits, split or SplitSettings())
        known.forget()
    return index


def scan_share(
    source: Source,
    output: Path,
    *,
    ranks: Ranks,
    package: Path,
    recognizer: Path | None = None,
    provider: str = "auto",
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Scan one process's share of the photos, for the `scan` run by rank 0. Arguments and errors as in `scan`."""
    loader = ModelLoader(source.root, package, recognizer, provider)
    with _single_thread():
        models = loader.open()
        share = ranks.share(len(source.photos))
        photos = source.photos[share.start : share.stop]
        with _open_progress(output, models, photos, source.root, ranks) as known:
            _measure_share(known, source, ranks, loader, models, workers, progress)


def _open_progress(
    output: Path, models: Models, photos: Sequence[ListedPhoto], root: Path, ranks: Ranks
) -> Progress:
    settings = {"version": _PROGRESS_VERSION, "codecs": codecs(), **models.facts()}
    # Skip photos whose text cannot be read: the text may be corrected before the next scan.
    return Progress(output, settings, [photo for photo in photos if not photo.problem], root, ranks)


def _measure_share(
    known: Progress,
    source: Source,
    ranks: Ranks,
    loader: ModelLoader,
    models: Models,
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Measure the photos of this process's share that have no result yet."""
    share = ranks.share(len(source.photos))
    waiting = [
        photo
        for photo in source.photos[share.start : share.stop]
        if not photo.problem and not known.knows(photo)
    ]
    total = len(source.photos) if ranks.is_first else len(share)
    done = len(share) - len(waiting)
    before = sum(not photo.problem for photo in source.photos[share.start : share.stop]) - len(waiting)
    if before:
        log.info("%d of %d photos were scanned before", before, len(share))
    progress(done, total)
    for photo, finding in _measure_all(waiting, loader, models, workers):
        known.add(photo, finding)
        done += 1
        progress(done, total)


def _wait_for_others(
    known: Progress, source: Source, ranks: Ranks, progress: Callable[[int, int], None]
) -> None:
    def left() -> int:
        known.read_others()
        progress(len(source.photos) - known.left, len(source.photos))
        return known.left

    def describe(count: int) -> str:
        return f"{count} photos are waited for, among them {some(known.first_left())}"

    if known.left:
        log.info("%s has scanned its photos and waits for the others (WORLD_SIZE is %d)", ranks, ranks.world)
        wait_for(left, describe, WAIT_TIMEOUT)


def _write(
    source: Source, output: Path, known: Progress, models: Models, limits: Limits, split: SplitSettings
) -> Index:
    """Make the index from the results, without holding all of them in memory."""
    notes = _Notes()
    count = len(source.photos)
    vectors = known.folder / "embeddings.safetensors"
    draft = known.folder / "draft.parquet"
    try:
        with StreamedTensors(vectors, {"embeddings": ("F32", (count, EMBEDDING_WIDTH))}) as file:

            def rows() -> Iterator[Row]:
                for number, photo in enumerate(source.photos):
                    found, embedding = (
                        measure(photo, source.root, models) if photo.problem else known.finding(photo)
                    )
                    notes.add(photo, found)
                    file.add(
                        "embeddings", np.zeros(EMBEDDING_WIDTH, "<f4") if embedding is None else embedding
                    )
                    yield _row(number, photo, found, limits)

            drafted = draft_rows(draft, rows(), count)
    except OSError as error:
        raise ConfigError(
            f"{known.folder}: cannot be written ({error.strerror or error}). Free some space and give the same command again; what was "
            "found so far is kept."
        ) from error
    embeddings = read_safetensors(vectors, mapped=True)[0]["embeddings"]
    edited = Edited.of(drafted)
    find_mismatches(edited, embeddings, limits.min_cosine)
    marked, split_facts = split_rows(Rows(edited), embeddings, split)
    facts = {
        "layout": source.layout,
        **models.facts(),
        "limits": asdict(limits),
        "split": split_facts,
        "files": source.files.facts(),
        "notes": [*source.notes, *notes.lines(count)],
    }
    return write_index(output, source.root, marked, embeddings, facts)


def find_mismatches(rows: Edited, embeddings: Tensor, least: float) -> None:
    """Mark photos that do not show their stated person.

    These have an embedding whose cosine to the median of the person's photos is below `least`. People with fewer than three usable
    photos are skipped.
    """
    everyone = Rows(rows)
    people = People(everyone.where((rows.status == STATUSES.index(OK)) & everyone.has_text("identity")))
    places = people.rows.places.astype(np.int64)
    for person in np.flatnonzero(people.sizes >= MIN_PHOTOS).tolist():
        photos = places[people.positions(person)]
        directions = torch.nn.functional.normalize(embeddings[torch.from_numpy(photos)], dim=1)
        median = torch.from_numpy(np.median(directions.numpy(), axis=0))
        median = torch.nn.functional.normalize(median, dim=0)
        for place, cosine in zip(photos.tolist(), (directions @ median).tolist(), strict=True):
            if cosine < least:
                reason = (
                    f"cosine {cosine:.2f} to the median of {len(photos)} photos of {rows.row(place).identity}, "
                    f"at least {least:.2f} is needed"
                )
                rows.refuse(place, "id_mismatch", reason)


class _Notes:
    """Notes about photos: each distinct note once, with the number of photos."""

    def __init__(self) -> None:
        self._remarked: dict[str, tuple[int, str]] = {}  # note: number of photos, and the first one

    def add(self, photo: ListedPhoto, found: Measured) -> None:
        if found.note:
            count, first = self._remarked.get(found.note, (0, photo.source))
            self._remarked[found.note] = count + 1, first

    def lines(self, photos: int) -> list[str]:
        return [
            f"{count} of {photos} photos: {note}; first: {first}"
            for note, (count, first) in self._remarked.items()
        ]


def _row(number: int, photo: ListedPhoto, found: Measured, limits: Limits) -> Row:
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


# ---------------------------------------------------------------------------------------------------- workers


def _measure_all(
    photos: Sequence[ListedPhoto], loader: ModelLoader, models: Models, workers: int
) -> Iterator[tuple[ListedPhoto, Finding]]:
    """Measure photos and yield each with its result, in any order."""
    if not workers:
        for photo in photos:
            yield photo, measure(photo, loader.root, models)
        return
    pool = ProcessPoolExecutor(
        workers,
        # Not forked: the runtime's threads do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(loader,),
    )
    others = multiprocessing.active_children()
    started: list[multiprocessing.process.BaseProcess] = []
    pending: dict[Future[Finding], ListedPhoto] = {}
    queue = iter(photos)
    try:
        while True:
            for photo in queue:
                with (
                    _interrupts_wait()
                ):  # a process started here would react to signals before `_start_worker` runs
                    pending[pool.submit(_measure_one, photo)] = photo
                if len(pending) >= workers * _AHEAD:
                    break
            if not pending:
                return
            started = started or [child for child in multiprocessing.active_children() if child not in others]
            done = wait(pending, WAIT_TIMEOUT, FIRST_COMPLETED).done
            if not done:
                raise InputError(
                    f"no photo was scanned for {WAIT_TIMEOUT:.0f} s: a worker is stuck at one of {_some_of(pending)}. Look at the disk that "
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
        if pending:  # do not wait when leaving early: a worker may be stuck, and it writes nothing
            kill_children(others)
        pool.shutdown(cancel_futures=True)


def _reason(workers: Sequence[multiprocessing.process.BaseProcess]) -> str:
    """How one of the workers died. The pool may read the exit code at the same moment, and the system gives it only once."""
    for _ in range(100):
        if reason := reason_of_death(workers):
            return reason
        time.sleep(0.01)
    return "it left no exit code"


def _some_of(pending: Mapping[Future[Finding], ListedPhoto]) -> str:
    return some(photo.source for photo in pending.values())


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Context manager: delay Ctrl+C to the end of the block. Processes started in the block ignore it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[ModelLoader, Models] | None = None


def _start_worker(loader: ModelLoader) -> None:
    global _worker
    exit_with_parent()  # a killed parent closes no queues; this process would wait forever
    ignore_signals()
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
    _worker = loader, loader.open()


def _measure_one(photo: ListedPhoto) -> Finding:
    assert _worker is not None
    loader, models = _worker
    return measure(photo, loader.root, models)


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
