"""Fetch batches from a loader's workers, with waits that can be interrupted and failures that give a reason."""

from __future__ import annotations

import errno
import logging
import multiprocessing.queues
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import IDAdapterError, TrainingError
from ..waiting import WAIT_TIMEOUT, WorkerThread, ignore_signals, memory_advice, reason_of_death, start_thread

log = logging.getLogger(__name__)

_BETWEEN_WARNINGS = 60.0  # seconds
_EXIT_TIMEOUT = 2.0  # seconds for workers to exit by themselves


class Batches:
    """The batches of a loader. Closing it ends the workers, even if other references to the iterator remain.

    Args:
        device: device of the batches, for pinning memory.
        poll: called every half second while waiting for a batch; an exception from it ends the wait.
        advice: next step for the user after the loader failed.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device | str = "cpu",
        poll: Callable[[], None] = lambda: None,
        advice: str = "",
    ) -> None:
        self._loader, self._device, self._advice = loader, torch.device(device), advice
        self._poll = poll
        self._iterator: Any = None
        self._thread = WorkerThread("data")
        self._is_stuck = self._is_closed = False
        self._warned = 0.0

    def next(self) -> Any:
        """The next batch. StopIteration at the end.

        Raises:
            IDAdapterError: a photo cannot be read, the loader failed, or nothing came for `WAIT_TIMEOUT` seconds.
        """
        self._warned = 0.0
        try:
            # The workers, too, are started in this thread: torch then does not install its SIGCHLD handler, which raises the error about a
            # dead worker anywhere in the main thread, for example in the middle of an update.
            batch = self._thread.run(self._fetch, self._wait)
        except BaseException:
            self._is_stuck = True  # do not ask the workers to exit
            raise
        if isinstance(batch, TrainingError):  # an error of the loader, not of a photo
            raise TrainingError(f"{batch} {self._advice}".rstrip())
        if isinstance(batch, IDAdapterError):
            raise batch
        return batch

    def _fetch(self) -> Any:
        try:
            if self._iterator is None:
                if self._device.type == "cuda":  # a new thread starts with the first device
                    torch.cuda.set_device(self._device)
                self._iterator = iter(self._loader)
                if self._is_closed:  # closed while the workers were starting
                    self._kill()
            return next(self._iterator, StopIteration())
        except IDAdapterError as error:
            return error
        except Exception as error:  # a worker can raise anything
            failure = TrainingError(self._failure(error))
            if self._iterator is None:
                _drop(error)
            return failure

    def __iter__(self) -> Any:
        while not isinstance(batch := self.next(), StopIteration):
            yield batch

    def _wait(self, seconds: float) -> None:
        self._poll()
        if death := self._death():  # torch notices only every 5 s
            raise TrainingError(f"{death} {self._advice}".rstrip())
        if seconds - self._warned >= _BETWEEN_WARNINGS:
            self._warned = seconds
            log.warning("no data for %.0f s: %s", seconds, self._reading())
        if seconds > WAIT_TIMEOUT:
            raise TrainingError(
                f"no data for {seconds:.0f} s: {self._reading()}. Look at the disk that the photos are on. {self._advice}".rstrip()
            )

    def _reading(self) -> str:
        workers = self._workers()
        if not workers:
            return "a photo is being read"
        return f"{len(workers)} worker processes are reading photos (pids {', '.join(str(w.pid) for w in workers)})"

    def _workers(self) -> list[Any]:
        return list(getattr(self._iterator, "_workers", ()))

    def _death(self) -> str:
        """Describe how a worker died; empty if none has."""
        memory = "use fewer data.workers, a smaller train.global_batch_size or a machine with more memory"
        reason = reason_of_death(self._workers(), {"SIGBUS": memory_advice(), "SIGKILL": memory})
        return f"a worker process of the loader died: {reason}." if reason else ""

    def _failure(self, error: Exception) -> str:
        if death := self._death():
            return death
        if getattr(error, "errno", None) == errno.ENOSPC:  # locks and queues use the same file system
            return f"the loader failed: {memory_advice()}."
        return f"the loader failed: {error}. data.workers = 0 shows more of the error."

    def close(self) -> None:
        """End the workers.

        They ignore SIGTERM, with which Python ends them at exit: without this, Python would wait for them forever if an error still refers
        to the iterator, or if one of them is stuck.
        """
        self._is_closed = True
        if self._is_stuck:
            self._kill()
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            # Torch waits long for each worker, and forever for an unfinished message of a dead one.
            thread = start_thread(shutdown, "shutdown")
            thread.join(_EXIT_TIMEOUT)
            self._kill()
            thread.join(_EXIT_TIMEOUT)
        self._thread.close()
        self._iterator = None

    def _kill(self) -> None:
        for worker in self._workers():
            if worker.is_alive():
                worker.kill()


def _drop(error: Exception) -> None:
    """Release an iterator that failed to start, without the traceback that torch's finaliser causes."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook


def prepare_worker(worker: int) -> None:
    """The `worker_init_fn` of a loader.

    Workers ignore signals sent to all processes of a run: they must survive until the trainer's checkpoint is written. A batch that
    cannot be sent is replaced by an error: Python would drop it, and the trainer would wait forever.
    """
    ignore_signals()
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Any, error: Exception, item: tuple[Any, Any]) -> None:
    """Put an error in place of a batch. Called where Python would print the error and drop the batch."""
    text = f"{error}"
    if "shared memory" in text or "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        text = memory_advice()
    elif "Too many open files" in text or getattr(error, "errno", None) == errno.EMFILE:
        text = f"too many files are open ({error}). Raise the limit with `ulimit -n 65536`, or set data.workers = 0"
    queue.put((item[0], TrainingError(f"a worker process cannot send the data that it read: {text}.")))


__all__ = ["Batches", "prepare_worker"]
