"""The processes of a run: how they share work, agree on every end, and wait for each other.

Devices, processes and reductions are accelerate's and torch.distributed's. All processes agree before each update, and after
everything that one of them may fail at, whether to go on: so none is left waiting in a reduction for another that stopped.
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
from .watch import WAITS, Watch, named


class Ranks:
    """This process among those of its run.

    Args:
        write: writes a checkpoint of the steps done, in the main process; called in all of them.
        keep: writes one in a process that has lost others; returns a sentence on what came of it.

    Raises:
        ConfigError: accelerate is set up for anything but DDP.
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
        self.is_settled = False
        """Whether all processes know how the run ended."""

    def agree(self, failure: Exception | None) -> None:
        """All processes hear of a failure or a signal in any of them.

        Raises:
            the failure, or TrainingError in the processes that did not fail. Unless the numbers went wrong, the steps before it are in
            a checkpoint then.
            Interrupted: one of them gave up its work for a signal.
        """
        is_broken, gives_up = isinstance(failure, NotFiniteError), isinstance(failure, Interrupted)
        heard = set(self._signals.heard)  # others may come in the meantime
        fails = failure is not None and not gives_up
        failed, is_broken, gives_up, stops, saves = self.any(
            [fails, is_broken, gives_up, "stop" in heard, "save" in heard]
        )
        self._signals.agreed(heard, stops=stops or gives_up, saves=saves)
        if gives_up and not failed:
            raise Interrupted
        if not failed:
            return
        failure = None if isinstance(failure, Interrupted) else failure
        if self._progress.step and not is_broken and not isinstance(failure, CheckpointError):
            with contextlib.suppress(CheckpointError, NotFiniteError):  # the failure is what must be told
                self._write()
        # Nobody leaves, and has the launcher end the others, before the checkpoint is written.
        self.any([False])
        self.is_settled = True
        if failure is None:
            raise TrainingError(
                f"step {self._progress.step + 1}: another process failed; its own message says why."
            )
        raise failure

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work that one process may fail at, with no collective in it: afterwards all of them agree."""
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

    def any(self, said: list[bool]) -> list[bool]:
        """Each of these, true where it is so in any process."""
        if self.world == 1:
            return said
        values = torch.tensor(said, dtype=torch.int32, device=self.device)
        with self.waiting():
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
            return [bool(value) for value in values.tolist()]

    def gathered(self, mine: Any) -> list[Any]:
        """A plain value of each process, by rank."""
        seen: list[Any] = [mine] * self.world
        if self.world > 1:
            with self.waiting():
                torch.distributed.all_gather_object(seen, mine)
        return seen

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A collective, in which this process waits for the others.

        Raises:
            TrainingError: one of them is gone; the steps done are in a checkpoint.
        """
        if self._watch is None:
            yield
            return
        with self._watch.doing(WAITS):
            try:
                yield
                return
            except (IDAdapterError, torch.cuda.OutOfMemoryError):
                raise
            except RuntimeError as error:
                problem = error
        raise self._parted(self._watch, problem) from problem

    def _parted(self, watch: Watch, error: RuntimeError) -> TrainingError:
        """The connection to another process broke: which one it is, as soon as it misses its signs."""
        deadline = time.monotonic() + 10
        while not (lost := watch.silent(3)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kept = self._keep() if self.rank == min(set(range(self.world)) - set(lost)) else ""
        who = f"{named(lost)} of {self.world}" if lost else "another process"
        # gloo names a line of its own source first, and guesses at the reason after the first sentence.
        reason = re.sub(r"^\[\S*\] *", "", f"{error}").split("\n")[0].split(". ")[0]
        return TrainingError(
            f"step {self._progress.step + 1}: {who} is gone ({reason}). {kept} Its own messages and those of its machine say why (perhaps "
            "for want of memory); go on with --resume auto."
        )

    def close(self) -> None:
        """Take leave of the others, who would be waited for for ever where they do not know that this process is leaving."""
        if self.is_settled:
            self.accelerator.end_training()


def _accelerator(config: RunConfig) -> Any:
    kwargs = require("accelerate.utils").DistributedDataParallelKwargs(
        # Gates are skipped where the identity is dropped in all of a micro-batch.
        find_unused_parameters=config.recipe.some_idle,
        gradient_as_bucket_view=True,  # the gradients are not held twice
    )
    # Precision is ours: autocast over fp32 weights, and none around the face network. Without `cpu`, accelerate takes each of
    # several processes on a machine without accelerators for the only one.
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
