"""Interruptible waiting for data, disks and processes.

Python handles signals only between its own instructions, not while the main thread is blocked in the operating system (a lost disk,
a pipe without a writer). So calls that may block forever run in a separate thread, and the caller polls for the result.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.process
import os
import queue
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

POLL_INTERVAL = 0.5
"""Polling interval in seconds."""
WAIT_TIMEOUT = 1800.0
"""Seconds without data or a response of the disk after which waiting ends."""
SHARED_MEMORY = Path("/dev/shm")
TERMINATED = 143  # usual exit code of a program ended by SIGTERM


class Terminated(BaseException):
    """SIGTERM was received. Like KeyboardInterrupt it is not caught by `except Exception`."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Context manager in which SIGTERM raises `Terminated`, so that cleanup code runs. No effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class WorkerThread:
    """A worker thread that runs one task at a time, while the caller waits and can give up.

    It is a daemon thread: a blocked task does not delay the end of the program.
    """

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._last: concurrent.futures.Future[Any] | None = None
        _workers.add(self)
        start_thread(self._work, name)

    def run(self, work: Callable[[], T], poll: Callable[[float], None]) -> T:
        """Run `work` in the thread and return its result or raise its exception.

        Args:
            poll: callback every `POLL_INTERVAL` seconds with the seconds waited so far. If it raises, waiting ends; the work
                continues, and its result is lost.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        began = time.monotonic()
        self._last = future
        self._tasks.put((future, work))
        while not concurrent.futures.wait([future], POLL_INTERVAL).done:
            poll(time.monotonic() - began)
        return future.result()

    @property
    def is_busy(self) -> bool:
        """Return whether the thread still runs a task whose caller gave up."""
        return self._last is not None and not self._last.done()

    def close(self) -> None:
        """End the thread after its current task."""
        self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del task, future, work  # otherwise the last result stays alive until the next task


_workers: weakref.WeakSet[WorkerThread] = weakref.WeakSet()  # each thread keeps its own object alive
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def start_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """Start a thread that does not keep the program alive, and that `end_threads` waits for."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def end_threads(timeout: float = 2.0) -> bool:
    """Wait at the program's end until the threads of this package are over.

    Python ends other threads wherever they are once it shuts down. If that is inside a library's C++ code, the process aborts
    (SIGABRT), even in a thread that only releases its last tensors.

    Args:
        timeout: seconds to wait. A task that its caller gave up is not waited for.

    Returns:
        Whether all threads are over. If not, leave with `exit_now`.
    """
    for worker in list(_workers):
        if worker.is_busy:
            return False
        worker.close()
    deadline = time.monotonic() + timeout
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in _threads)


def exit_with_parent() -> None:
    """End this process when the one that started it ends, however that happens."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def memory_advice() -> str:
    """Return advice for processes that cannot exchange data because shared memory is full."""
    size = ""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        size = f" ({usage.free / 2**20:,.1f} of its {usage.total / 2**20:,.1f} MB are free)"
    return (
        f"shared memory is full: {SHARED_MEMORY}{size}. Give it more (Docker: `--shm-size=8g` or `--ipc=host`; elsewhere "
        f"`mount -o remount,size=8g {SHARED_MEMORY}`), or set data.workers = 0, which needs none"
    )


def reason_of_death(
    workers: Iterable[multiprocessing.process.BaseProcess], advice: Mapping[str, str] | None = None
) -> str:
    """Describe how a worker process died; empty if none died, or all exited normally.

    Args:
        advice: text to append, by the name of the signal that ended the process.
    """
    bad = [code for worker in workers if not worker.is_alive() and (code := worker.exitcode)]
    if not bad:
        return ""
    code = min(
        bad, key=lambda code: code == -signal.SIGTERM
    )  # others may have received it after the first one died
    if code > 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    more = (advice or {}).get(name, "")
    return f"it was ended by {name}{memory}{more and f': {more}'}"


def ignore_signals() -> None:
    """Ignore signals in a worker process; the parent handles them and ends its workers."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def kill_children(but: Sequence[multiprocessing.process.BaseProcess] = ()) -> None:
    """Kill the worker processes of this process, even blocked ones, except those in `but`."""
    for child in multiprocessing.active_children():
        if child not in but:
            child.kill()


def exit_now(code: int) -> None:
    """End this process immediately, without waiting for threads or workers and without exit handlers of libraries."""
    kill_children()
    os._exit(code)


__all__ = [
    "POLL_INTERVAL",
    "SHARED_MEMORY",
    "TERMINATED",
    "WAIT_TIMEOUT",
    "Terminated",
    "WorkerThread",
    "end_threads",
    "exit_now",
    "exit_with_parent",
    "ignore_signals",
    "kill_children",
    "memory_advice",
    "reason_of_death",
    "start_thread",
    "terminable",
]
