"""Signals: SIGTERM and Ctrl+C end a run after its step, with a checkpoint; SIGUSR1 asks for a checkpoint alone."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from ..waiting import Terminated

_INSIST = 5.0  # seconds after which another SIGTERM is no copy of the first, which launchers and clusters send to the same process


class Interrupted(Exception):  # noqa: N818  # no error: a signal
    """A signal was heard in the middle of a step or of what is done between two steps, which is given up."""


class Signals:
    """The signals of a run.

    `heard` holds "stop" and "save" as this process alone has heard them; another thread may add to it. `stops` and `saves` are what
    all processes have agreed on.
    """

    def __init__(self) -> None:
        self.heard: set[str] = set()
        self.stops = self.saves = False

    @property
    def is_stopping(self) -> bool:
        """Whether a signal asked for the end, here or in another process."""
        return self.stops or "stop" in self.heard

    def look(self) -> None:
        """Raise `Interrupted` where a signal asked for the end: whatever is waited for is given up."""
        if self.is_stopping:
            raise Interrupted

    def agreed(self, heard: set[str], *, stops: bool, saves: bool) -> None:
        """All processes know of the signals that this one had `heard`, and of those of the others."""
        self.heard.difference_update(heard)
        self.stops, self.saves = self.stops or stops, self.saves or saves

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Hear signals in the block: the first one ends the run after its step, with a checkpoint, a second one at once.

        Raises:
            Terminated: a second SIGTERM.
            KeyboardInterrupt: a second Ctrl+C.
        """
        stopped_at = 0.0

        def stop(number: int, frame: object) -> None:
            nonlocal stopped_at
            if stopped_at and time.monotonic() - stopped_at > _INSIST:
                raise Terminated
            stopped_at = stopped_at or time.monotonic()
            self.heard.add("stop")

        def save(number: int, frame: object) -> None:
            self.heard.add("save")

        def interrupt(number: int, frame: object) -> None:
            if self.is_stopping:
                raise KeyboardInterrupt
            sys.stderr.write(
                "\nstopping after this step, with a checkpoint; press Ctrl+C again to leave at once\n"
            )
            self.heard.add("stop")

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
