"""The training loop.

A step depends only on its number, the weights and the optimiser state (see `randomness`), so a resumed run gives the same result as
an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import config_toml, writable
from ..data.rows import Row
from ..errors import ConfigError, IDAdapterError, NotFiniteError, TrainingError
from ..files import some, write_file
from ..waiting import TERMINATED
from . import provenance
from .adapters import trainable
from .bundle import Bundle
from .cache import Cache, kinds
from .checkpoints import ADAPTER, Checkpoint, latest, write_checkpoint
from .config import RunConfig
from .disk import Disk
from .finite import advice_on_numbers, not_finite
from .loading import Batches, prepare_worker
from .monitor import Monitor
from .parts import load_parts, prepare_adapter, require_files
from .ranks import Ranks
from .samples import Batch, MicroBatches, Samples, collate
from .signals import Interrupted, Signals
from .state import CONFIG, Progress, State
from .watch import Watch, start_watch

log = logging.getLogger(__name__)

RESUME = ("never", "auto")
STOPPED = TERMINATED


def train(config: RunConfig, *, resume: str = "never", allow_config_change: bool = False) -> int:
    """Run the training, from the start or from the last checkpoint.

    Args:
        resume: "never": refuse a folder that already holds checkpoints; "auto": continue from the newest checkpoint, if any.
        allow_config_change: continue even if settings or data that affect the result have changed.

    Returns:
        the exit code: 0 when all steps are done, `STOPPED` after a signal, with a checkpoint written unless the disk refused it.

    Raises:
        IDAdapterError: bad settings, bad data or a failed training step; the last good checkpoint is kept.
    """
    if resume not in RESUME:
        raise ConfigError(f"resume must be one of {', '.join(RESUME)}, got {resume!r}")
    folder = writable("output.folder", config.output.folder)
    require_files(config, "cache")
    start = latest(folder)
    if start is not None and resume == "never":
        raise ConfigError(
            f"{config.output.folder} holds a run already (step {start.step}). Add `--resume auto` to go on with it, or set "
            "another output.folder."
        )
    if start is not None and start.step >= config.train.steps:
        sys.stderr.write(f"{folder}: all {start.step} steps are done; raise train.steps to go on.\n")
        return 0
    signals = Signals()
    watch = start_watch(signals.received)
    is_end_agreed = False
    try:
        run = _Run(config, start, allow_config_change, signals, watch)
        try:
            with signals.handlers():
                return run.go()
        except TrainingError as error:
            if not (signals.is_stopping and run.disk.is_busy):
                raise
            sys.stderr.write(f"{error}\n")
            return STOPPED
        finally:
            is_end_agreed = run.ranks.is_end_agreed
            run.close()
    finally:
        if watch is not None:
            watch.close(is_end_agreed)


class _Run:
    def __init__(
        self,
        config: RunConfig,
        start: Checkpoint | None,
        allow_config_change: bool,
        signals: Signals,
        watch: Watch | None,
    ) -> None:
        self.config, self.signals = config, signals
        self.folder = Path(config.output.folder)
        self.progress = Progress()
        self._updating = threading.Lock()  # held while weights, optimiser and step are inconsistent
        self.ranks = Ranks(config, self.progress, signals, watch, write=self._write, keep=self._keep)
        self.disk = Disk(self.folder, self.progress, signals, watch, self.ranks.device)
        # Bad batch sizes are refused before anything is loaded.
        MicroBatches(config, 1, 0, rank=self.ranks.rank, world=self.ranks.world)
        self.parts = self.disk.load(lambda: load_parts(config, self.ranks.device))
        self.digests = self.disk.load(lambda: provenance.digests(config, self.parts))
        then = {} if start is None else self.disk.load(start.state)
        provenance.require_one_start(self.ranks, start, self.digests)
        if start is not None:
            if not allow_config_change:
                provenance.require_same(config, self.digests, start, then)
            self.progress.step = self.progress.saved = start.step
        self.progress.position = int(then.get("position", 0))
        self._prepare(start)
        self.store = Cache(Path(config.data.cache), kinds(self.parts, config)) if config.data.cache else None
        self.monitor = Monitor(
            config,
            self.parts,
            self.bundle,
            self.state,
            self._samples,
            ranks=self.ranks,
            disk=self.disk,
            signals=signals,
            progress=self.progress,
        )
        if watch is not None:
            watch.save = self._keep

    def _prepare(self, start: Checkpoint | None) -> None:
        """Inject the adapter into its UNet and set up the training state."""
        config, parts = self.config, self.parts
        path = None if start is None else start.path / ADAPTER
        adapter = self.disk.load(lambda: prepare_adapter(config, parts, path))
        parameters = trainable(adapter)
        self.bundle = Bundle(parts.base, adapter, parts.networks, config).to(self.ranks.device)
        self.state = state = State(config, adapter, parameters)
        if start is not None:
            self.disk.load(lambda: state.load(start, lambda path: prepare_adapter(config, parts, path)))
        if config.train.gradient_checkpointing:
            parts.base.unet.enable_gradient_checkpointing()
        with self.ranks.waiting():
            self.model: nn.Module = self.ranks.accelerator.prepare(self.bundle)

    def go(self) -> int:
        """Run all remaining steps and return the exit code."""
        with self.ranks.together():
            if self.ranks.is_main:
                self.disk.use(self._begin)
        samples = self._samples(self.parts.train_rows)
        keys = MicroBatches(
            self.config,
            len(samples),
            self.progress.step,
            position=self.progress.position,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        loader = DataLoader(
            samples,
            batch_sampler=keys,
            collate_fn=collate,
            num_workers=self.config.data.workers,
            worker_init_fn=prepare_worker,
            pin_memory=self.ranks.device.type == "cuda",
        )
        batches = Batches(
            loader, self.ranks.device, self.signals.raise_if_stopping, "Go on with --resume auto."
        )
        try:
            return self._steps(batches)
        finally:
            batches.close()

    def _begin(self) -> None:
        """Write the run's own records, in the main process."""
        parameters = self.state.parameters
        facts = provenance.facts(self.parts, self.ranks, self.digests, parameters)
        write_file(self.folder / CONFIG, config_toml(self.config).encode())
        write_file(self.folder / provenance.FACTS, json.dumps(facts, indent=1).encode())
        description = provenance.describe(self.config, self.parts, self.ranks, parameters, self.progress.step)
        sys.stderr.write(f"{self.folder}: {description}\n")
        self.monitor.open_log()

    def _samples(self, rows: Sequence[Row]) -> Samples:
        vision = self.parts.networks.vision
        return Samples(
            self.parts.index,
            rows,
            self.config,
            self.parts.base.schedule.steps,
            self.store,
            None if vision is None else vision.preprocess,
            self.parts.base.unet.config.in_channels,
        )

    def close(self) -> None:
        """Close everything and restore the UNet."""
        if not self.disk.is_busy:
            self.monitor.close()
        self.disk.close()
        if self.bundle.injected is not None:
            self.bundle.injected.eject()
        self.ranks.close()

    # ------------------------------------------------------------------------------------------------ steps

    def _steps(self, batches: Batches) -> int:
        try:
            self._all_steps(batches)
        except Interrupted:  # all processes stopped at the same point
            self._save()
        self.ranks.is_end_agreed = True
        step = self.progress.step
        is_done = step >= self.config.train.steps
        if self.ranks.is_main:
            self.monitor.close()  # first, to end its progress bar
            if is_done:
                sys.stderr.write(
                    f"{self.folder}: all {step} steps are done. `python -m idadapter_core export {self.folder} NAME.safetensors` "
                    "writes the file for ComfyUI.\n"
                )
            elif step:
                log.warning("stopped by a signal after step %d; the checkpoint is written", step)
            else:
                log.warning("stopped by a signal before the first step was done; there is nothing to keep")
        return 0 if is_done else STOPPED

    def _all_steps(self, batches: Batches) -> None:
        """Run the remaining steps, or stop at a signal."""
        train, output = self.config.train, self.config.output
        progress, monitor = self.progress, self.monitor
        if progress.step == 0 and output.validate_every:
            monitor.validate()
        while progress.step < train.steps and not self.signals.stops:
            began = time.perf_counter()
            monitor.observe()
            self._one_step(batches)
            monitor.interval.steps += 1
            monitor.interval.seconds += time.perf_counter() - began
            is_last = progress.step == train.steps
            if progress.step % output.log_every == 0 or is_last:
                monitor.write_log()
            monitor.advance()
            if _is_due(progress.step, output.validate_every, is_last):
                monitor.validate()
            if _is_due(progress.step, output.sample_every, is_last):
                monitor.draw()
            is_wanted = self.signals.stops or self.signals.saves
            if progress.step % output.save_every == 0 or is_last or is_wanted:
                self.signals.saves = False
                self._save()

    def _one_step(self, batches: Batches) -> None:
        train, state, interval = self.config.train, self.state, self.monitor.interval
        done: list[tuple[Batch, dict[str, Tensor]]] = []
        failure: Exception | None = None
        try:
            self._forward(batches, done)
        except Exception as error:  # from a photo, a worker or a device; the other processes must be told
            failure = error
        if failure is None and (problem := not_finite(done)):
            failure = self._bad_numbers(problem)
        self.ranks.agree(failure)
        with self.ranks.waiting():
            torch.autograd.backward(done[-1][1]["loss"] / train.gradient_accumulation_steps)
            # On a GPU, reading this number is the synchronisation point.
            norm = float(
                nn.utils.clip_grad_norm_(state.parameters.values(), train.max_grad_norm or float("inf"))
            )
        if not math.isfinite(norm):  # equal in all processes: their gradients are now the same
            self.ranks.is_end_agreed = True
            sources = ", ".join(source for batch, _ in done for source in batch.sources)
            raise self._bad_numbers(
                f"the gradient is not finite. Photos of that step: {sources}. Look at them."
            )
        for batch, losses in done:
            interval.add(batch, losses)
        interval.gradient = norm
        with self._updating:
            state.update(self.progress.step)
            self.progress.step += 1
            self.progress.position += train.global_batch_size
        state.optimizer.zero_grad(set_to_none=True)

    def _forward(self, batches: Batches, done: list[tuple[Batch, dict[str, Tensor]]]) -> None:
        """Append the losses of all micro-batches to `done` and compute the gradients of all but the last.

        With two or more processes, gradients are synchronised in the last backward pass only.
        """
        count = self.config.train.gradient_accumulation_steps
        for micro in range(count):
            is_last = micro == count - 1
            before = time.perf_counter()
            with contextlib.nullcontext() if is_last else self.ranks.accelerator.no_sync(self.model):
                batch = batches.next()
                self.monitor.interval.waited += time.perf_counter() - before
                batch = batch.to(self.ranks.device)
                losses: dict[str, Tensor] = self.model(batch)
                done.append((batch, losses))
                if not is_last:
                    torch.autograd.backward(losses["loss"] / count)

    def _bad_numbers(self, problem: str) -> NotFiniteError:
        """Error for the coming step, with advice and the checkpoint to restart from."""
        advice = advice_on_numbers(self.config.train)
        return NotFiniteError(f"step {self.progress.step + 1}: {problem} {advice} {self._last_good()}")

    def _last_good(self) -> str:
        """Advice on where to restart from."""
        kept = self.disk.latest()
        if kept is None:
            return "There is no checkpoint yet: start again."
        return (
            f"The last good checkpoint, of step {kept.step}, is kept: go on from it with --resume auto, and with "
            "--allow-config-change if you changed a setting."
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """Write a checkpoint of this step. Collective: every process learns whether the write failed."""
        with self.ranks.together():
            self._write()

    def _write(self) -> None:
        progress = self.progress
        is_new = progress.step and progress.saved != progress.step
        if self.ranks.is_main and is_new and not self.disk.is_busy:
            self._write_now()

    def _write_now(self) -> None:
        progress, output = self.progress, self.config.output
        # An update can overflow even if loss and gradient were finite. Never replace good weights with such ones.
        if broken := self.state.broken():
            raise NotFiniteError(
                f"step {progress.step}: {len(broken)} weights are not finite ({some(broken)}). "
                f"{advice_on_numbers(self.config.train)} {self._last_good()}"
            )
        known = {"step": progress.step, "position": progress.position, **self.digests}
        self.disk.use(
            lambda: write_checkpoint(
                self.folder,
                progress.step,
                known,
                self.state.write,
                keep_last=output.keep_last,
                keep_every=output.keep_every,
            )
        )
        progress.saved = progress.step

    def _keep(self) -> str:
        """Write a checkpoint of the steps done after other processes were lost. Returns a sentence about the outcome."""
        step = self.progress.step
        with self._updating:
            try:
                found = self.disk.latest()
                if step and (found is None or found.step != step):
                    self._write_now()
                    found = self.disk.latest()
            except IDAdapterError as error:
                return f"{error}"
        if found is None:
            return "There is no checkpoint yet."
        return f"The checkpoint of step {found.step} is written."


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return bool(every) and (step % every == 0 or is_last)


__all__ = ["RESUME", "STOPPED", "train"]
