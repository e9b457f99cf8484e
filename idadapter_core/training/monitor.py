"""Logging, validation on people outside the training data, and sample grids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.rows import Row
from ..errors import TrainingError
from ..logs import RunLog
from ..randomness import epoch_order
from ..waiting import WAIT_TIMEOUT, WorkerThread
from .bundle import Bundle
from .config import RunConfig
from .disk import Disk
from .grids import sample_grid
from .loading import Batches
from .parts import Parts
from .ranks import Ranks
from .samples import VALIDATION, Batch, Samples, collate
from .signals import Signals
from .state import Progress, State, learning_rate


@dataclass
class Interval:
    """Values collected since the last log line. Tensors stay on the device until the next line."""

    losses: list[Tensor] = field(default_factory=list)
    mse: list[Tensor] = field(default_factory=list)
    cosine: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0  # time in steps, without the work between them
    waited: float = 0.0  # part of it spent waiting for data
    steps: int = 0
    gradient: float = 0.0
    # By site: (2,), norms of the addition and of its base.
    norms: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        """Add a micro-batch and its losses."""
        self.losses.append(losses["loss"].detach()[None])
        self.mse.append(losses["mse"])
        self.cosine.append(losses["cosine"])
        self.counts.append(losses["counts"])
        self.timesteps.append(batch.timesteps.to(losses["mse"].device))


class Monitor:
    """Log, validation and sample grids of a run. Collective; the main process writes.

    Args:
        samples: makes samples of index rows, prepared as in training.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        bundle: Bundle,
        state: State,
        samples: Callable[[Sequence[Row]], Samples],
        *,
        ranks: Ranks,
        disk: Disk,
        signals: Signals,
        progress: Progress,
    ) -> None:
        self._config, self._parts, self._bundle, self._state = config, parts, bundle, state
        self._samples = samples
        self._ranks, self._disk, self._signals, self._progress = ranks, disk, signals, progress
        self._folder = Path(config.output.folder)
        self._log: RunLog | None = None
        self.interval = Interval()

    def open_log(self) -> None:
        """Open the log, in the main process before its first step. Other processes have no log."""
        output = self._config.output
        self._log = RunLog(self._folder, self._progress.step, self._config.train.steps, output.tensorboard)

    def advance(self) -> None:
        """Count a step as done."""
        if self._log is not None:
            self._log.advance()

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._disk.use(self._log.close)

    # ------------------------------------------------------------------------------------------------ the log

    def observe(self) -> None:
        """Measure the adapter's norms per site in the coming step, if that step is logged."""
        injected = self._bundle.injected
        if injected is None:
            return
        norms = self.interval.norms

        def note(site: int, added: Tensor, base: Tensor) -> None:
            norms.setdefault(site, []).append(torch.stack([added, base]))

        step = self._progress.step + 1
        is_logged = step % self._config.output.log_every == 0 or step == self._config.train.steps
        injected.observe(note if is_logged else None)

    def write_log(self) -> None:
        """Write a log line about the steps since the last one."""
        interval, self.interval = self.interval, Interval()
        with self._ranks.waiting():
            together = [
                self._ranks.accelerator.gather(torch.cat(values)).float().cpu()
                for values in (
                    interval.losses,
                    interval.mse,
                    interval.cosine,
                    interval.counts,
                    interval.timesteps,
                )
            ]
            norms = self._norm_ratios(interval)
        with self._ranks.together():
            if self._log is not None:
                values = self._values(interval, together)
                values |= {"norm_ratios": norms} if norms else {}
                self._report(values)
                self._log.show(
                    self._progress.step,
                    *(values[name] for name in ("loss", "images_per_second", "seconds_left")),
                )

    def _report(self, values: Mapping[str, Any]) -> None:
        log, step = self._log, self._progress.step
        if log is not None:
            self._disk.use(lambda: log.write(step, values))

    def _values(self, interval: Interval, together: list[Tensor]) -> dict[str, Any]:
        """The values of a log line."""
        losses, mse, cosine, counts, timesteps = together
        train, step = self._config.train, self._progress.step
        seen = cosine[counts > 0]
        deciles = (timesteps * 10 / self._parts.base.schedule.steps).long()
        speed = interval.steps / max(interval.seconds, 1e-9)
        values: dict[str, Any] = {
            "loss": float(losses.mean()),
            "denoising": float(mse.mean()),
            "loss_by_decile": [float(mse[deciles == decile].mean()) for decile in range(10)],
            "identity": {
                "cosine": float(seen.mean()) if len(seen) else None,
                "share": len(seen) / len(counts),
            },
            "lr": learning_rate(self._config, step - 1),
            "gradient_norm": interval.gradient,
            "images_per_second": speed * train.global_batch_size,
            "data_wait_share": interval.waited / max(interval.seconds, 1e-9),
            "seconds_left": (train.steps - step) / speed,
        }
        gated = self._state.adapter.mechanisms.gated
        if gated is not None:
            values["gates"] = {str(site): list(pair) for site, pair in gated.openings().items()}
        return values

    def _norm_ratios(self, interval: Interval) -> dict[str, float]:
        """By site: norm of the adapter's addition over the norm of its base, in the last step, over all processes."""
        injected = self._bundle.injected
        if injected is None:
            return {}
        nothing = [torch.zeros(2, device=self._ranks.device)]
        squares = [torch.stack(interval.norms.get(site, nothing)).square().sum(0) for site in injected.sites]
        norms = self._ranks.accelerator.reduce(torch.stack(squares), reduction="sum").sqrt().tolist()
        return {
            str(site): added / base for site, (added, base) in zip(injected.sites, norms, strict=True) if base
        }

    # ------------------------------------------------------------------------------------------------ pictures

    @torch.no_grad()
    def validate(self) -> None:
        """Log the denoising error, with and without the adapter, on fixed samples of people outside the training data."""
        ranks = self._ranks
        sums = torch.zeros(3)
        with (
            ranks.together(),
            self._state.averaged(),
            contextlib.closing(self._validation_batches()) as batches,
        ):
            for batch in batches:
                self._signals.raise_if_stopping()
                with_adapter, alone = self._bundle.measure(batch.to(ranks.device))
                sums += torch.stack(
                    [with_adapter.sum().cpu(), alone.sum().cpu(), torch.tensor(float(len(batch)))]
                )
        with ranks.waiting():
            error, alone, number = ranks.accelerator.reduce(sums.to(ranks.device), reduction="sum").tolist()
        measured = {
            "loss": error / number,
            "loss_of_base": alone / number,
            "samples": int(number),
            "people": "test" if self._parts.test_rows else "train",
        }
        with ranks.together():
            self._report({"validation": measured})

    def _validation_batches(self) -> Batches:
        """This process's validation batches, equal each time."""
        ranks, config = self._ranks, self._config
        rows = self._parts.test_rows or self._parts.train_rows
        # Spread over the people: the index is ordered by person.
        order = epoch_order(0, VALIDATION, len(rows)).tolist()
        count = config.output.validate_samples
        keys = [(VALIDATION - number // len(rows), order[number % len(rows)]) for number in range(count)]
        mine = keys[ranks.rank :: ranks.world]
        size = max(
            config.train.global_batch_size // (ranks.world * config.train.gradient_accumulation_steps), 1
        )
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        loader = DataLoader(self._samples(rows), batch_sampler=parts, collate_fn=collate)
        return Batches(loader, ranks.device, self._signals.raise_if_stopping)

    def draw(self) -> None:
        """Draw a sample grid in the main process."""

        def poll(seconds: float) -> None:
            self._signals.raise_if_stopping()
            if seconds > WAIT_TIMEOUT:
                raise TrainingError(
                    f"step {self._progress.step}: the pictures of {self._folder} wait for a disk for {seconds:.0f} s. Look at those of "
                    "the photos and of output.folder, then go on with --resume auto."
                )

        with self._ranks.together(), contextlib.closing(WorkerThread("pictures")) as worker:
            if self._log is not None:
                log, step = self._log, self._progress.step
                with self._state.averaged():
                    pixels = sample_grid(
                        self._bundle,
                        self._state.adapter,
                        self._parts,
                        self._config,
                        self._folder,
                        step,
                        poll=self._signals.raise_if_stopping,
                        wait=lambda work: worker.run(work, poll),
                    )
                self._disk.use(lambda: log.picture(step, "samples", pixels))


__all__ = ["Interval", "Monitor"]
