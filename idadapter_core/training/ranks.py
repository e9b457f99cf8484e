"""Coordination of a run's processes: sharing work, agreeing on how to end, waiting for each other.

Devices, processes and reductions come from accelerate and torch.distributed. All processes agree on whether to continue before each
update and after everything that one of them may fail at, so none waits in a reduction for another that has stopped.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError, IDAdapterError, NotFiniteError, TrainingError
from ..extra import require
from .config import RunConfig
from .signals import Interrupted, Signals
from .state import Progress
from .watch import WAITING, Watch, process_names


class Ranks:
    """This process and its peers.

    Args:
        write: writes a checkpoint of the steps done, in the main process. Called in all processes.
        keep: writes a checkpoint after other processes were lost; returns a sentence about the outcome.

    Raises:
        ConfigError: accelerate is configured for anything but DDP.
    """

    def __init__(
        self,
        config: RunConfig,
        progress: Progress,
        signals: Signals,
        watch: Watch | None,
        *,
        write: Callable[[], None],
        keep: Callable[[], str],
    ) -> None:
        self._folder = Path(config.output.folder)
        self._progress, self._signals, self._watch = progress, signals, watch
        self._write, self._keep = write, keep
        self.accelerator = _accelerator(config)
        self.is_main = bool(self.accelerator.is_main_process)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_end_agreed = False
        """Whether all processes know how the run ended."""

    def agree(self, failure: Exception | None) -> None:
        """Share a failure or signal of any process with all of them.

        Raises:
            the failure; TrainingError in the processes that did not fail. The steps before it are then in a checkpoint, unless the
                numbers were not finite.
            Interrupted: a process stopped its work because of a signal.
        """
        is_broken, gives_up = isinstance(failure, NotFiniteError), isinstance(failure, Interrupted)
        received = set(self._signals.received)  # more may arrive in the meantime
        fails = failure is not None and not gives_up
        failed, is_broken, gives_up, stops, saves = self.any(
            [fails, is_broken, gives_up, "stop" in received, "save" in received]
        )
        self._signals.apply(received, stops=stops or gives_up, saves=saves)
        if gives_up and not failed:
            raise Interrupted
        if not failed:
            return
        failure = None if isinstance(failure, Interrupted) else failure
        if self._progress.step and not is_broken and not isinstance(failure, CheckpointError):
            # Report the original failure, not this one.
            with contextlib.suppress(CheckpointError, NotFiniteError):
                self._write()
        # Wait until the checkpoint is written: the first process to exit makes the launcher end the others.
        self.any([False])
        self.is_end_agreed = True
        if failure is None:
            raise TrainingError(
                f"step {self._progress.step + 1}: another process failed; its own message says why."
            )
        raise failure

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context manager for work without collectives that one process may fail at; all processes agree afterwards."""
        failure: Exception | None = None
        try:
            yield
        except OSError as error:
            failure = TrainingError(
                f"step {self._progress.step}: {self._folder} cannot be written ({error}). Free some space or bring the folder back, then "
                "go on with --resume auto."
            )
        except Exception as error:
            failure = error
        self.agree(failure)

    def any(self, flags: list[bool]) -> list[bool]:
        """Element-wise "or" over all processes."""
        if self.world == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32, device=self.device)
        with self.waiting():
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
            return [bool(value) for value in values.tolist()]

    def gathered(self, mine: Any) -> list[Any]:
        """A plain value from each process, by rank."""
        seen: list[Any] = [mine] * self.world
        if self.world > 1:
            with self.waiting():
                torch.distributed.all_gather_object(seen, mine)
        return seen

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager for a collective, in which this process waits for the others.

        Raises:
            TrainingError: a process is gone; the steps done are in a checkpoint.
        """
        if self._watch is None:
            yield
            return
        with self._watch.in_state(WAITING):
            try:
                yield
                return
            except (IDAdapterError, torch.cuda.OutOfMemoryError):
                raise
            except RuntimeError as error:
                problem = error
        raise self._parted(self._watch, problem) from problem

    def _parted(self, watch: Watch, error: RuntimeError) -> TrainingError:
        """The error for a broken connection. Names the lost process as soon as it misses its signs of life."""
        deadline = time.monotonic() + 10
        while not (lost := watch.silent(3)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kept = self._keep() if self.rank == min(set(range(self.world)) - set(lost)) else ""
        who = f"{process_names(lost)} of {self.world}" if lost else "another process"
        # gloo begins with a source line, and guesses at the reason after the first sentence.
        reason = re.sub(r"^\[\S*\] *", "", f"{error}").split("\n")[0].split(". ")[0]
        return TrainingError(
            f"step {self._progress.step + 1}: {who} is gone ({reason}). {kept} Its own messages and those of its machine say why (perhaps "
            "for want of memory); go on with --resume auto."
        )

    def close(self) -> None:
        """End the process group, unless others do not know yet that this process exits: it would wait for them forever."""
        if self.is_end_agreed:
            self.accelerator.end_training()


def _accelerator(config: RunConfig) -> Any:
    kwargs = require("accelerate.utils").DistributedDataParallelKwargs(
        # Gates are skipped where the identity is dropped in a whole micro-batch.
        find_unused_parameters=config.recipe.some_idle,
        gradient_as_bucket_view=True,  # do not hold the gradients twice
    )
    # Precision is handled here: autocast over fp32 weights, and none around the face network. Without `cpu`, accelerate assumes
    # a single process on a machine without accelerators.
    accelerator = require("accelerate").Accelerator(
        mixed_precision="no", cpu=not has_accelerator(), kwargs_handlers=[kwargs]
    )
    kind = accelerator.distributed_type
    if kind not in ("NO", "MULTI_CPU") and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"accelerate is set up for {kind}, but this trainer shares work by DDP alone. Choose multi-GPU without FSDP or "
            "DeepSpeed in `accelerate config`, or use torchrun."
        )
    return accelerator


def has_accelerator() -> bool:
    """Whether there is a device other than the CPU."""
    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


__all__ = ["Ranks", "has_accelerator"]
