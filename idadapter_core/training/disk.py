"""Read and write in a separate thread, because disks may hang: signals still work, and waits have a limit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import TrainingError
from ..waiting import WAIT_TIMEOUT, WorkerThread
from .checkpoints import Checkpoint, latest
from .signals import Signals
from .state import Progress
from .watch import WRITING, Watch

T = TypeVar("T")

log = logging.getLogger(__name__)

# Seconds that a disk may take for a checkpoint after a signal; one of IDAdapter on SDXL has 33 GB.
_GRACE = 600.0
_BETWEEN_WARNINGS = 60.0  # seconds


class Disk:
    """Access to the disk of output.folder and to those that models are read from."""

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        signals: Signals,
        watch: Watch | None,
        device: torch.device,
    ) -> None:
        self._folder, self._progress, self._signals, self._watch = folder, progress, signals, watch
        self._device = device
        self._worker = WorkerThread("disk")

    @property
    def is_busy(self) -> bool:
        """Whether abandoned work is still running."""
        return self._worker.is_busy

    def close(self) -> None:
        """Accept no more work."""
        self._worker.close()

    def use(self, work: Callable[[], T]) -> T:
        """Do work that may hang on the disk of output.folder.

        After a signal, the work has `_GRACE` seconds left, because a checkpoint takes time; a second signal ends the wait.

        Raises:
            TrainingError: the work is not done after the grace period, or after `WAIT_TIMEOUT` seconds without a signal.
        """
        warned = 0.0
        signal_at = WAIT_TIMEOUT - _GRACE  # time of a signal, in seconds of this wait

        def poll(seconds: float) -> None:
            nonlocal warned, signal_at
            if self._signals.is_stopping:
                signal_at = min(signal_at, seconds)
            if seconds - signal_at > _GRACE:
                raise TrainingError(
                    f"step {self._progress.step}: {self._folder} has not answered for {seconds:.0f} s. {self._last_saved()} Look at the "
                    "disk, then go on with --resume auto."
                )
            if seconds - warned > _BETWEEN_WARNINGS:
                warned = seconds
                log.warning("%s has not answered for %.0f s", self._folder, seconds)

        with contextlib.nullcontext() if self._watch is None else self._watch.in_state(WRITING):
            return self._worker.run(work, poll)

    def load(self, work: Callable[[], T]) -> T:
        """Read models or a checkpoint before the first step. A signal ends it immediately: there is nothing to save yet.

        Raises:
            TrainingError: not done after `WAIT_TIMEOUT` seconds.
        """

        def read() -> T:
            if self._device.type == "cuda":  # the current device is per thread
                torch.cuda.set_device(self._device)
            return work()

        def poll(seconds: float) -> None:
            if seconds > WAIT_TIMEOUT:
                raise TrainingError(
                    f"models and checkpoints are not read after {seconds:.0f} s. Look at the disks of output.folder ({self._folder}) and "
                    "of the files under [base], then start again."
                )

        return self._worker.run(read, poll)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint in output.folder."""
        return self.use(lambda: latest(self._folder))

    def _last_saved(self) -> str:
        return (
            f"The last checkpoint is that of step {self._progress.saved}."
            if self._progress.saved > 0
            else "There is no checkpoint yet."
        )


__all__ = ["Disk"]
