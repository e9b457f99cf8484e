"""Waiting that can end: for data, for disks, for processes.

Python hears a signal between two of its own steps. While a thread waits inside the operating system (a disk that is gone, a pipe that
nobody writes to), there are none. So what may take for ever is done in a thread of its own, and who waits for it looks up often.
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

TURN = 0.5
"""Seconds from one look at signals to the next."""
PATIENCE = 1800.0
"""Seconds without any data, or any answer of a disk, after which waiting ends."""
SHARED_MEMORY = Path("/dev/shm")
TERMINATED = 143  # exit code after SIGTERM, as of a program that the signal ended


class Terminated(BaseException):
    """SIGTERM was heard. As KeyboardInterrupt, no error: it passes all `except Exception`."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block, so that what is half done is cleared away. Outside the main thread: nothing changes."""
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


class Aside:
    """A thread that does one thing after the other, while the caller waits for it and can leave.

    The thread does not hold up the end of the program, whatever it is stuck in.
    """

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._last: concurrent.futures.Future[Any] | None = None
        _asides.add(self)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def do(self, work: Callable[[], T], look: Callable[[float], None]) -> T:
        """What `work` returns or raises.

        Args:
            look: is called every `TURN` seconds with the seconds waited so far; what it raises ends the waiting. The work goes on
                then, and what comes of it is lost.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        began = time.monotonic()
        self._last = future
        self._tasks.put((future, work))
        while not concurrent.futures.wait([future], TURN).done:
            look(time.monotonic() - began)
        return future.result()

    @property
    def is_busy(self) -> bool:
        """Whether it is still at what somebody left who waited for it."""
        return self._last is not None and not self._last.done()

    def close(self) -> None:
        """The thread ends after what it is at."""
        self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del task, future, work  # or the last result is kept until the next task comes


_asides: weakref.WeakSet[Aside] = weakref.WeakSet()  # a thread holds its own


def is_work_left() -> bool:
    """Whether a thread aside is still at something that nobody waits for any more."""
    return any(aside.is_busy for aside in _asides)


def memory_advice() -> str:
    """What to do where processes cannot hand data to each other in shared memory."""
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
    """How a worker process died, in words; empty where none has, or all ended well.

    Args:
        advice: what to add, by the name of the signal that ended it.
    """
    bad = [code for worker in workers if not worker.is_alive() and (code := worker.exitcode)]
    if not bad:
        return ""
    code = min(
        bad, key=lambda code: code == -signal.SIGTERM
    )  # which the others may have got when the first had died
    if code > 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    more = (advice or {}).get(name, "")
    return f"it was ended by {name}{memory}{more and f': {more}'}"


def ignore_signals() -> None:
    """For a worker process: signals are for its parent, which ends its workers when it is time."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def kill_children(but: Sequence[multiprocessing.process.BaseProcess] = ()) -> None:
    """End the worker processes of this one at once, whatever they are stuck in, but for some."""
    for child in multiprocessing.active_children():
        if child not in but:
            child.kill()


def exit_now(code: int) -> None:
    """End this process without waiting for anything: no thread, no worker, no library that would say good-bye to others."""
    kill_children()
    os._exit(code)


__all__ = [
    "PATIENCE",
    "SHARED_MEMORY",
    "TERMINATED",
    "TURN",
    "Aside",
    "Terminated",
    "exit_now",
    "ignore_signals",
    "is_work_left",
    "kill_children",
    "memory_advice",
    "reason_of_death",
    "terminable",
]
