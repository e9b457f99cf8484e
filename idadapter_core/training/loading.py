"""Batches from a loader's workers: fetched so that waiting for them can end, and ends with a reason where it must."""

from __future__ import annotations

import errno
import logging
import multiprocessing.queues
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import IDAdapterError, TrainingError
from ..waiting import PATIENCE, Aside, ignore_signals, memory_advice, reason_of_death

log = logging.getLogger(__name__)

_BETWEEN_WARNINGS = 60.0  # seconds
_LEAVE = 2.0  # seconds for workers to leave by themselves


class Batches:
    """The batches of a loader, from workers that are gone when it is closed, whoever still holds on to it.

    Args:
        device: that the batches are for, which decides whose memory they are pinned in.
        look: is called every half second while a batch is waited for; what it raises ends the waiting.
        advice: what to do after the loader failed.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device | str = "cpu",
        look: Callable[[], None] = lambda: None,
        advice: str = "",
    ) -> None:
        self._loader, self._device, self._advice = loader, torch.device(device), advice
        self._look = look
        self._iterator: Any = None
        self._aside = Aside("data")
        self._is_stuck = self._is_closed = False
        self._warned = 0.0

    def next(self) -> Any:
        """The next one. StopIteration at the end.

        Raises:
            IDAdapterError: a photo cannot be read, the loader failed, or nothing came for `PATIENCE` seconds.
        """
        self._warned = 0.0
        try:
            # Started in that thread, too: torch then leaves its handler of SIGCHLD out, which raises its error about a dead worker
            # wherever the main thread happens to be, in the middle of an update for example.
            batch = self._aside.do(self._fetch, self._wait)
        except BaseException:
            self._is_stuck = True  # nobody asks the workers for leave
            raise
        if isinstance(batch, TrainingError):  # the loader's, not a photo's
            raise TrainingError(f"{batch} {self._advice}".rstrip())
        if isinstance(batch, IDAdapterError):
            raise batch
        return batch

    def _fetch(self) -> Any:
        try:
            if self._iterator is None:
                if self._device.type == "cuda":  # a thread starts with the first one
                    torch.cuda.set_device(self._device)
                self._iterator = iter(self._loader)
                if self._is_closed:  # while they were started
                    self._kill()
            return next(self._iterator, StopIteration())
        except IDAdapterError as error:
            return error
        except Exception as error:  # whatever a worker does
            failure = TrainingError(self._failure(error))
            if self._iterator is None:
                _drop(error)
            return failure

    def __iter__(self) -> Any:
        while not isinstance(batch := self.next(), StopIteration):
            yield batch

    def _wait(self, seconds: float) -> None:
        self._look()
        if death := self._death():  # of which torch hears every 5 s
            raise TrainingError(f"{death} {self._advice}".rstrip())
        if seconds - self._warned >= _BETWEEN_WARNINGS:
            self._warned = seconds
            log.warning("no data for %.0f s: %s", seconds, self._who())
        if seconds > PATIENCE:
            raise TrainingError(
                f"no data for {seconds:.0f} s: {self._who()}. Look at the disk that the photos are on. {self._advice}".rstrip()
            )

    def _who(self) -> str:
        workers = self._workers()
        if not workers:
            return "a photo is being read"
        return f"{len(workers)} worker processes are reading photos (pids {', '.join(str(w.pid) for w in workers)})"

    def _workers(self) -> list[Any]:
        return list(getattr(self._iterator, "_workers", ()))

    def _death(self) -> str:
        """How a worker died, in words; empty where none has."""
        memory = "use fewer data.workers, a smaller train.global_batch_size or a machine with more memory"
        reason = reason_of_death(self._workers(), {"SIGBUS": memory_advice(), "SIGKILL": memory})
        return f"a worker process of the loader died: {reason}." if reason else ""

    def _failure(self, error: Exception) -> str:
        if death := self._death():
            return death
        if getattr(error, "errno", None) == errno.ENOSPC:  # locks and queues live there, too
            return f"the loader failed: {memory_advice()}."
        return f"the loader failed: {error}. data.workers = 0 shows more of the error."

    def close(self) -> None:
        """End the workers. They do not heed SIGTERM, by which Python ends them at its exit: without this it would wait for them for
        ever where an error still refers to the iterator, or where one of them is stuck."""
        self._is_closed = True
        if self._is_stuck:
            self._kill()
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            # Torch waits long for each worker, and for ever for what one that died has begun to say.
            leave = threading.Thread(target=shutdown, name="leave", daemon=True)
            leave.start()
            leave.join(_LEAVE)
            self._kill()
            leave.join(_LEAVE)
        self._aside.close()
        self._iterator = None

    def _kill(self) -> None:
        for worker in self._workers():
            if worker.is_alive():
                worker.kill()


def _drop(error: Exception) -> None:
    """Let go of an iterator that failed to start, of whose last breath torch makes a traceback."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook


def prepare_worker(worker: int) -> None:
    """The `worker_init_fn` of a loader.

    A signal to all processes of a run must not end workers before the trainer's checkpoint is written. And a batch that cannot be
    handed over must not get lost, as Python has it: then the trainer would wait for it for ever.
    """
    ignore_signals()
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_error  # type: ignore[attr-defined]


def _hand_over_error(queue: Any, error: Exception, item: tuple[Any, Any]) -> None:
    """Put an error in the place of a batch. Called where Python would print it and forget the batch."""
    text = f"{error}"
    if "shared memory" in text or "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        text = memory_advice()
    elif "Too many open files" in text or getattr(error, "errno", None) == errno.EMFILE:
        text = f"too many files are open ({error}). Raise the limit with `ulimit -n 65536`, or set data.workers = 0"
    queue.put((item[0], TrainingError(f"what a worker process read cannot be handed over: {text}.")))


__all__ = ["Batches", "prepare_worker"]
