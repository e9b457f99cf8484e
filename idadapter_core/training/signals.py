"""Signal handling: SIGTERM and Ctrl+C end a run after the current step with a checkpoint; SIGUSR1 only writes a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from ..waiting import Terminated

# Seconds. Launchers and clusters may both send the first SIGTERM to a process; only a later one counts as a second.
_SECOND_SIGNAL_DELAY = 5.0


class Interrupted(Exception):  # noqa: N818  # no error: a signal
    """A signal interrupted a step, or the work between two steps; that work is dropped."""


class Signals:
    """The signals of a run.

    `received` holds "stop" and "save" as received by this process; another thread may add to it. `stops` and `saves` are agreed on by all
    processes.
    """

    def __init__(self) -> None:
        self.received: set[str] = set()
        self.stops = self.saves = False

    @property
    def is_stopping(self) -> bool:
        """Whether this or another process was asked to stop."""
        return self.stops or "stop" in self.received

    def raise_if_stopping(self) -> None:
        """Raise `Interrupted` if a signal asked to stop. Called while waiting."""
        if self.is_stopping:
            raise Interrupted

    def apply(self, received: set[str], *, stops: bool, saves: bool) -> None:
        """Apply the decision of all processes, which includes the signals that this one had `received`."""
        self.received.difference_update(received)
        self.stops, self.saves = self.stops or stops, self.saves or saves

    @contextlib.contextmanager
    def handlers(self) -> Iterator[None]:
        """Context manager: the first signal ends the run after its step with a checkpoint, a second one immediately.

        Raises:
            Terminated: a second SIGTERM.
            KeyboardInterrupt: a second Ctrl+C.
        """
        stopped_at = 0.0

        def stop(number: int, frame: object) -> None:
            nonlocal stopped_at
            if stopped_at and time.monotonic() - stopped_at > _SECOND_SIGNAL_DELAY:
                raise Terminated
            stopped_at = stopped_at or time.monotonic()
            self.received.add("stop")

        def save(number: int, frame: object) -> None:
            self.received.add("save")

        def interrupt(number: int, frame: object) -> None:
            if self.is_stopping:
                raise KeyboardInterrupt
            sys.stderr.write(
                "\nstopping after this step, with a checkpoint; press Ctrl+C again to leave at once\n"
            )
            self.received.add("stop")

        wanted = {"SIGTERM": stop, "SIGINT": interrupt, "SIGUSR1": save}
        before: dict[int, Any] = {}
        for name, handler in wanted.items():
            if hasattr(signal, name):  # Windows has no SIGUSR1
                before[getattr(signal, name)] = signal.signal(getattr(signal, name), handler)
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


__all__ = ["Interrupted", "Signals"]
