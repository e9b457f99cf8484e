"""The engine: steps, processes, checkpoints. Devices, processes and reductions are accelerate's and torch.distributed's.

What a step does depends on its number, the weights and the optimiser's state alone (see `randomness`), so a run that goes on
from a checkpoint equals one that was never cut off. All processes agree before each update, and after all else that one of them
may fail at, whether to go on: so none is left waiting in a reduction for another that stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..adapter import save_adapter
from ..config import config_toml, writable
from ..errors import CheckpointError, ConfigError, IDAdapterError, NotFiniteError, TrainingError
from ..extra import require, versions
from ..faces.packages import DETECTION
from ..files import file_digest, some, write_file
from ..logs import RunLog
from ..randomness import epoch_order
from ..waiting import PATIENCE, TERMINATED, Aside, Terminated
from .adapters import trainable
from .bundle import Bundle
from .cache import Cache, kinds
from .checkpoints import ADAPTER, EMA, OPTIMIZER, Checkpoint, latest, load_optimizer, write_checkpoint
from .config import RunConfig, TrainConfig, differences, read_config
from .grids import sample_grid
from .loading import Batches, prepare_worker
from .parts import load_parts, prepare_adapter, require_files
from .samples import VALIDATION, Batch, MicroBatches, Samples, collate
from .watch import WAITS, WRITES, Watch, arrive, named

T = TypeVar("T")

log = logging.getLogger(__name__)

CONFIG, FACTS = "config.toml", "run.json"
RESUME = ("never", "auto")
STOPPED = TERMINATED
_INSIST = 5.0  # seconds after which another SIGTERM is no copy of the first, which launchers and clusters send to the same process
_DISK_GRACE = (
    600.0  # seconds from a signal in which a disk may take a checkpoint, which of IDAdapter on SDXL has 33 GB
)
_BETWEEN_WARNINGS = 60.0  # seconds
# What may differ in a run that goes on: it changes nothing of a step, or is known by the digest of what the path leads to.
_FREE = {
    "base": ("path", "config", "tokenizer", "vae", "vision", "recognizer", "face_package"),
    "data": ("index", "workers", "cache", "max_bad_share"),
    "adapter": ("start",),
    "train": ("accumulate", "checkpointing"),
    "output": None,
}
_FACTS = {
    "config": "settings",
    "data": "the index of photos",
    "base": "the base model",
    "recognizer": "the face network",
    "vision": "CLIP vision",
    "detector": "the face detector",
}


def train(config: RunConfig, *, resume: str = "never", allow_config_change: bool = False) -> int:
    """A whole run, from its start or from its last checkpoint to its last step.

    Args:
        resume: "never" refuses a folder that holds checkpoints already; "auto" goes on from the newest one, if there is one.
        allow_config_change: go on although settings or data that change the result are others than before.

    Returns:
        the exit code: 0 when all steps are done, `STOPPED` when a signal ended the run, after a checkpoint or where the disk took none.

    Raises:
        IDAdapterError: settings, data, or the training itself; the last good checkpoint is there.
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
    signals: set[str] = set()
    watch = arrive(signals)
    is_settled = False
    try:
        run = _Run(config, start, allow_config_change, signals, watch)
        try:
            with _signals(run):
                return run.go()
        except TrainingError as error:
            if not (run.is_stopping and run.aside.is_busy):
                raise
            sys.stderr.write(f"{error}\n")
            return STOPPED
        finally:
            is_settled = run.is_settled
            run.close()
    finally:
        if watch is not None:
            watch.close(is_settled)


@dataclass
class _Interval:
    """What happened since the last line of the log. Tensors stay on the device until then."""

    losses: list[Tensor] = field(default_factory=list)
    mse: list[Tensor] = field(default_factory=list)
    cosine: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0  # in steps, without what is done between them
    waited: float = 0.0  # of these, for data
    steps: int = 0
    gradient: float = 0.0
    norms: dict[int, list[Tensor]] = field(
        default_factory=dict
    )  # by site: (2,), of what is added and to what

    def add(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        """A micro-batch and what came of it."""
        self.losses.append(losses["loss"].detach()[None])
        self.mse.append(losses["mse"])
        self.cosine.append(losses["cosine"])
        self.counts.append(losses["counts"])
        self.timesteps.append(batch.timesteps.to(losses["mse"].device))


class _Interrupted(Exception):  # noqa: N818  # no error: a signal
    """A signal was heard in the middle of a step or of what is done between two steps, which is given up."""


class _Run:
    def __init__(
        self,
        config: RunConfig,
        start: Checkpoint | None,
        allow_config_change: bool,
        signals: set[str],
        watch: Watch | None,
    ) -> None:
        self.signals = signals  # "stop" and "save", as this process alone has heard them
        self.watch = watch
        self.step = 0
        self.aside = Aside("disk")
        self._updating = threading.Lock()  # held while weights, optimiser and step do not belong together
        accelerate = require("accelerate")
        kwargs = require("accelerate.utils").DistributedDataParallelKwargs(
            # Gates are skipped where the identity is dropped in all of a micro-batch.
            find_unused_parameters=config.recipe.some_idle,
            gradient_as_bucket_view=True,  # the gradients are not held twice
        )
        # Precision is ours: autocast over fp32 weights, and none around the face network. Without `cpu`, accelerate takes each of
        # several processes on a machine without accelerators for the only one.
        self.accelerator = accelerate.Accelerator(
            mixed_precision="no", cpu=not has_accelerator(), kwargs_handlers=[kwargs]
        )
        kind = self.accelerator.distributed_type
        if kind not in ("NO", "MULTI_CPU") and not kind.startswith("MULTI_"):
            raise ConfigError(
                f"accelerate is set up for {kind}, but this trainer shares work by DDP alone. Choose multi-GPU without FSDP or "
                "DeepSpeed in `accelerate config`, or use torchrun."
            )
        self.config = config
        self.folder = Path(config.output.folder)
        self.is_main = bool(self.accelerator.is_main_process)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        MicroBatches(config, 1, 0, rank=self.rank, world=self.world)  # refused before anything is loaded
        self.parts = self._read(lambda: load_parts(config, self.device))
        self.facts = self._read(self._what_it_depends_on)
        self.state = {} if start is None else self._read(start.state)
        with self._waiting():
            self._require_one_start(start)
        if start is not None:
            self._require_same(start, allow_config_change)
        self.step = 0 if start is None else start.step
        self.position = int(self.state.get("position", 0))  # of the next sample in the sequence of all epochs
        adapter = None if start is None else start.path / ADAPTER
        self.adapter = self._read(lambda: prepare_adapter(config, self.parts, adapter))
        self.parameters = trainable(self.adapter)
        bundle = Bundle(self.parts.base, self.adapter, self.parts.networks, config).to(self.device)
        self.bundle = bundle
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.train.lr,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        self.ema: dict[str, Tensor] = {}
        if config.train.ema:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        if start is not None:
            self._read(lambda: self._load(start))
        if config.train.checkpointing:
            self.parts.base.unet.enable_gradient_checkpointing()
        with self._waiting():
            self.model: nn.Module = self.accelerator.prepare(bundle)
        self.store = Cache(Path(config.data.cache), kinds(self.parts, config)) if config.data.cache else None
        self.stops = self.saves = False  # as all processes agreed on
        self.is_settled = False  # all processes know how the run ended
        self.saved = self.step if start is not None else -1
        self.log: RunLog | None = None
        if watch is not None:
            watch.save = self._keep

    # ------------------------------------------------------------------------------------------------ the loop

    def go(self) -> int:
        with self._together():
            if self.is_main:
                self._to_disk(self._open_log)
        config = self.config
        samples = self._samples(self.parts.train_rows)
        keys = MicroBatches(
            config, len(samples), self.step, position=self.position, rank=self.rank, world=self.world
        )
        loader = DataLoader(
            samples,
            batch_sampler=keys,
            collate_fn=collate,
            num_workers=config.data.workers,
            worker_init_fn=prepare_worker,
            pin_memory=self.device.type == "cuda",
        )
        batches = Batches(loader, self.device, self._look, "Go on with --resume auto.")
        try:
            return self._steps(batches)
        finally:
            batches.close()

    def _open_log(self) -> None:
        write_file(self.folder / CONFIG, config_toml(self.config).encode())
        write_file(self.folder / FACTS, json.dumps(self._facts(), indent=1).encode())
        sys.stderr.write(f"{self.folder}: {self._in_words()}\n")
        self.log = RunLog(self.folder, self.step, self.config.train.steps, self.config.output.tensorboard)

    def _steps(self, batches: Batches) -> int:
        try:
            self._all_steps(batches)
        except _Interrupted:  # all processes gave up the same thing
            self._save()
        self.is_settled = True
        if self.step < self.config.train.steps:
            self._tell_of_the_stop()
            return STOPPED
        if self.log is not None:
            self._to_disk(self.log.close)
            sys.stderr.write(
                f"{self.folder}: all {self.step} steps are done. `python -m idadapter_core export {self.folder} NAME.safetensors` "
                "writes the file for ComfyUI.\n"
            )
        return 0

    def _all_steps(self, batches: Batches) -> None:
        """The steps that are left, or as many as there are before a signal."""
        config = self.config
        interval = _Interval()
        if self.step == 0 and config.output.validate_every:
            self._validate()
        while self.step < config.train.steps and not self.stops:
            began = time.perf_counter()
            self._observe(interval)
            self._one_step(batches, interval)
            interval.steps += 1
            interval.seconds += time.perf_counter() - began
            is_last = self.step == config.train.steps
            if self.step % config.output.log_every == 0 or is_last:
                self._write_log(interval)
                interval = _Interval()
            if self.log is not None:
                self.log.advance()
            if _is_due(self.step, config.output.validate_every, is_last):
                self._validate()
            if _is_due(self.step, config.output.sample_every, is_last):
                self._sample()
            if self.step % config.output.save_every == 0 or is_last or self.stops or self.saves:
                self.saves = False
                self._save()

    def _tell_of_the_stop(self) -> None:
        if self.log is None:
            return
        self._to_disk(self.log.close)  # its bar first
        if self.step:
            log.warning("stopped by a signal after step %d; the checkpoint is written", self.step)
        else:
            log.warning("stopped by a signal before the first step was done; there is nothing to keep")

    def _observe(self, interval: _Interval) -> None:
        """Have the adapter's share in each block measured, in a step that is logged."""
        injected = self.bundle.injected
        if injected is None:
            return

        def note(site: int, added: Tensor, base: Tensor) -> None:
            interval.norms.setdefault(site, []).append(torch.stack([added, base]))

        is_logged = (
            self.step + 1
        ) % self.config.output.log_every == 0 or self.step + 1 == self.config.train.steps
        injected.observe(note if is_logged else None)

    def _one_step(self, batches: Batches, interval: _Interval) -> None:
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        done: list[tuple[Batch, dict[str, Tensor]]] = []
        failure: Exception | None = None
        for micro in range(train.accumulate):
            is_last = micro == train.accumulate - 1
            before = time.perf_counter()
            try:
                # With 2 or more processes, gradients are shared in the last backward pass alone.
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                    batch = batches.next()
                    interval.waited += time.perf_counter() - before
                    batch = batch.to(self.device)
                    losses: dict[str, Tensor] = self.model(batch)
                    done.append((batch, losses))
                    if not is_last:
                        torch.autograd.backward(losses["loss"] / train.accumulate)
            except (
                Exception
            ) as error:  # whatever a photo, a worker or a device does: the others must hear of it
                failure = error
                break
        if failure is None and (problem := _not_finite(done)):
            failure = NotFiniteError(
                f"step {self.step + 1}: {problem} {advice_on_numbers(train)} {self._what_is_kept()}"
            )
        self._agree(failure)
        with self._waiting():
            torch.autograd.backward(done[-1][1]["loss"] / train.accumulate)
            # On a GPU the waiting is here, where the number is asked for.
            norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), train.clip or float("inf")))
        if not math.isfinite(norm):  # the same in all processes, which have the same gradients now
            self.is_settled = True
            sources = ", ".join(source for batch, _ in done for source in batch.sources)
            raise NotFiniteError(
                f"step {self.step + 1}: the gradient is not finite. Photos of that step: {sources}. Look at them. "
                f"{advice_on_numbers(train)} {self._what_is_kept()}"
            )
        for batch, losses in done:
            interval.add(batch, losses)
        interval.gradient = norm
        with self._updating:
            self.optimizer.step()
            self._average()
            self.step += 1
            self.position += train.batch
        self.optimizer.zero_grad(set_to_none=True)

    def _what_is_kept(self) -> str:
        """Advice for who has to start again: from where."""
        kept = self._to_disk(lambda: latest(self.folder))
        if kept is None:
            return "There is no checkpoint yet: start again."
        return (
            f"The last good checkpoint, of step {kept.step}, is kept: go on from it with --resume auto, and with "
            "--allow-config-change if you changed a setting."
        )

    def _agree(self, failure: Exception | None) -> None:
        """All processes hear of a failure or a signal in any of them.

        Raises:
            the failure, or TrainingError in the processes that did not fail. Where it was not the numbers that went wrong, the
            steps before it are in a checkpoint then.
        """
        is_broken, gives_up = isinstance(failure, NotFiniteError), isinstance(failure, _Interrupted)
        heard = set(self.signals)  # others may come in the meantime
        fails = failure is not None and not gives_up
        failed, is_broken, gives_up, stops, saves = self._any(
            [fails, is_broken, gives_up, "stop" in heard, "save" in heard]
        )
        self.signals -= heard
        self.stops, self.saves = self.stops or stops or gives_up, self.saves or saves
        if gives_up and not failed:
            raise _Interrupted
        if not failed:
            return
        failure = None if isinstance(failure, _Interrupted) else failure
        if self.step and not is_broken and not isinstance(failure, CheckpointError):
            with contextlib.suppress(CheckpointError, NotFiniteError):  # the failure is what must be told
                self._write()
        self._any(
            [False]
        )  # nobody leaves, and has the launcher end the others, before the checkpoint is written
        self.is_settled = True
        if failure is None:
            raise TrainingError(f"step {self.step + 1}: another process failed; its own message says why.")
        raise failure

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Something that one process may fail at, and no collective is in: afterwards all of them agree."""
        failure: Exception | None = None
        try:
            yield
        except OSError as error:
            failure = TrainingError(
                f"step {self.step}: {self.folder} cannot be written ({error}). Free some space or bring the folder back, then go on with "
                "--resume auto."
            )
        except Exception as error:
            failure = error
        self._agree(failure)

    def _any(self, said: list[bool]) -> list[bool]:
        """Each of these, true where it is so in any process."""
        if self.world == 1:
            return said
        values = torch.tensor(said, dtype=torch.int32, device=self.device)
        with self._waiting():
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
            return [bool(value) for value in values.tolist()]

    # ------------------------------------------------------------------------------------------------ waiting

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """A collective, in which this process waits for the others.

        Raises:
            TrainingError: one of them is gone; the steps done are in a checkpoint.
        """
        if self.watch is None:
            yield
            return
        with self.watch.doing(WAITS):
            try:
                yield
                return
            except (IDAdapterError, torch.cuda.OutOfMemoryError):
                raise
            except RuntimeError as error:
                problem = error
        raise self._parted(problem) from problem

    def _parted(self, error: RuntimeError) -> TrainingError:
        """The connection to another process broke: which one it is, as soon as it misses its signs."""
        assert self.watch is not None
        deadline = time.monotonic() + 10
        while not (lost := self.watch.silent(3)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kept = self._keep() if self.rank == min(set(range(self.world)) - set(lost)) else ""
        who = f"{named(lost)} of {self.world}" if lost else "another process"
        # gloo names a line of its own source first, and guesses at the reason after the first sentence.
        reason = re.sub(r"^\[\S*\] *", "", f"{error}").split("\n")[0].split(". ")[0]
        return TrainingError(
            f"step {self.step + 1}: {who} is gone ({reason}). {kept} Its own messages and those of its machine say why (perhaps for "
            "want of memory); go on with --resume auto."
        )

    def _keep(self) -> str:
        """A checkpoint of the steps done, by a process that has lost others; says what came of it."""
        with self._updating:
            try:
                found = self._to_disk(lambda: latest(self.folder))
                if self.step and (found is None or found.step != self.step):
                    self._write_now()
                    found = self._to_disk(lambda: latest(self.folder))
            except IDAdapterError as error:
                return f"{error}"
        return _kept(found)

    @property
    def is_stopping(self) -> bool:
        """Whether a signal asked for the end, here or in another process."""
        return self.stops or "stop" in self.signals

    def _look(self) -> None:
        """Give up what is waited for, where a signal was heard."""
        if self.is_stopping:
            raise _Interrupted

    def _to_disk(self, work: Callable[[], T]) -> T:
        """What may hang with the disk of output.folder. A signal leaves it `_DISK_GRACE` seconds, for a checkpoint takes its time; a
        second one ends it.

        Raises:
            TrainingError: it is not done after the grace, or after `PATIENCE` seconds without a signal.
        """
        warned = 0.0
        heard = PATIENCE - _DISK_GRACE  # when a signal was, in seconds of this waiting

        def look(seconds: float) -> None:
            nonlocal warned, heard
            if self.is_stopping:
                heard = min(heard, seconds)
            if seconds - heard > _DISK_GRACE:
                raise TrainingError(
                    f"step {self.step}: {self.folder} has not answered for {seconds:.0f} s. {self._last_saved()} Look at the disk, then go "
                    "on with --resume auto."
                )
            if seconds - warned > _BETWEEN_WARNINGS:
                warned = seconds
                log.warning("%s has not answered for %.0f s", self.folder, seconds)

        with contextlib.nullcontext() if self.watch is None else self.watch.doing(WRITES):
            return self.aside.do(work, look)

    def _read(self, work: Callable[[], T]) -> T:
        """What is read before the first step: models, a checkpoint. A signal ends it at once, for there is nothing to keep yet.

        Raises:
            TrainingError: it is not done after `PATIENCE` seconds.
        """

        def read() -> T:
            if self.device.type == "cuda":  # each thread has a device of its own
                torch.cuda.set_device(self.device)
            return work()

        def look(seconds: float) -> None:
            if seconds > PATIENCE:
                raise TrainingError(
                    f"models and checkpoints are not read after {seconds:.0f} s. Look at the disks of output.folder ({self.folder}) and of "
                    "the files under [base], then start again."
                )

        return self.aside.do(read, look)

    def _last_saved(self) -> str:
        return (
            f"The last checkpoint is that of step {self.saved}."
            if self.saved > 0
            else "There is no checkpoint yet."
        )

    def _average(self) -> None:
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        if self.ema:
            torch._foreach_lerp_(
                list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay
            )

    # ------------------------------------------------------------------------------------------------ measuring

    def _samples(self, rows: Any) -> Samples:
        vision = self.parts.networks.vision
        return Samples(
            self.parts.index,
            rows,
            self.config,
            self.parts.base.schedule.steps,
            self.store,
            None if vision is None else vision.preprocess,
        )

    def _write_log(self, interval: _Interval) -> None:
        with self._waiting():
            together = [
                self.accelerator.gather(torch.cat(values)).float().cpu()
                for values in (
                    interval.losses,
                    interval.mse,
                    interval.cosine,
                    interval.counts,
                    interval.timesteps,
                )
            ]
            norms = self._norm_ratios(interval)
        with self._together():
            if self.log is not None:
                values = self._values(interval, together)
                values |= {"norm_ratios": norms} if norms else {}
                self._tell(values)
                self.log.show(
                    self.step, *(values[name] for name in ("loss", "images_per_second", "seconds_left"))
                )

    def _tell(self, values: Mapping[str, Any]) -> None:
        log, step = self.log, self.step
        if log is not None:
            self._to_disk(lambda: log.write(step, values))

    def _values(self, interval: _Interval, together: list[Tensor]) -> dict[str, Any]:
        """A line of the log."""
        losses, mse, cosine, counts, timesteps = together
        seen = cosine[counts > 0]
        deciles = (timesteps * 10 / self.parts.base.schedule.steps).long()
        speed = interval.steps / max(interval.seconds, 1e-9)
        values: dict[str, Any] = {
            "loss": float(losses.mean()),
            "denoising": float(mse.mean()),
            "loss_by_decile": [float(mse[deciles == decile].mean()) for decile in range(10)],
            "identity": {
                "cosine": float(seen.mean()) if len(seen) else None,
                "share": len(seen) / len(counts),
            },
            "lr": learning_rate(self.config, self.step - 1),
            "gradient_norm": interval.gradient,
            "images_per_second": speed * self.config.train.batch,
            "data_wait_share": interval.waited / max(interval.seconds, 1e-9),
            "seconds_left": (self.config.train.steps - self.step) / speed,
        }
        gates: dict[int, tuple[float, float]] = getattr(self.bundle.layers, "gate_values", dict)()
        if gates:
            values["gates"] = {str(site): list(pair) for site, pair in gates.items()}
        return values

    def _norm_ratios(self, interval: _Interval) -> dict[str, float]:
        """By site: the norm of what the adapter adds, over that of what it adds to, in the last step of all processes."""
        injected = self.bundle.injected
        if injected is None:
            return {}
        nothing = [torch.zeros(2, device=self.device)]
        squares = [torch.stack(interval.norms.get(site, nothing)).square().sum(0) for site in injected.sites]
        norms = self.accelerator.reduce(torch.stack(squares), reduction="sum").sqrt().tolist()
        return {
            str(site): added / base for site, (added, base) in zip(injected.sites, norms, strict=True) if base
        }

    @torch.no_grad()
    def _validate(self) -> None:
        """The denoising error on fixed samples of people who are not trained on, with the adapter and without it."""
        rows = self.parts.test_rows or self.parts.train_rows
        samples = self._samples(rows)
        # Spread over the people: the order of the index goes from one to the next.
        order = epoch_order(0, VALIDATION, len(rows)).tolist()
        count = self.config.output.validate_samples
        keys = [(VALIDATION - number // len(rows), order[number % len(rows)]) for number in range(count)]
        mine = keys[self.rank :: self.world]
        size = max(self.config.train.batch // (self.world * self.config.train.accumulate), 1)
        sums = torch.zeros(3)
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        loader = DataLoader(samples, batch_sampler=parts, collate_fn=collate)
        with (
            self._together(),
            self._averaged(),
            contextlib.closing(Batches(loader, self.device, self._look)) as batches,
        ):
            for batch in batches:
                self._look()
                with_adapter, alone = self.bundle.measure(batch.to(self.device))
                sums += torch.stack(
                    [with_adapter.sum().cpu(), alone.sum().cpu(), torch.tensor(float(len(batch)))]
                )
        with self._waiting():
            error, alone, number = self.accelerator.reduce(sums.to(self.device), reduction="sum").tolist()
        measured = {
            "loss": error / number,
            "loss_of_base": alone / number,
            "samples": int(number),
            "people": "test" if self.parts.test_rows else "train",
        }
        with self._together():
            self._tell({"validation": measured})

    def _sample(self) -> None:
        def look(seconds: float) -> None:
            self._look()
            if seconds > PATIENCE:
                raise TrainingError(
                    f"step {self.step}: the pictures of {self.folder} wait for a disk for {seconds:.0f} s. Look at those of the photos and "
                    "of output.folder, then go on with --resume auto."
                )

        with self._together(), contextlib.closing(Aside("pictures")) as aside:
            if self.log is not None:
                with self._averaged():
                    pixels = sample_grid(
                        self.bundle,
                        self.adapter,
                        self.parts,
                        self.config,
                        self.folder,
                        self.step,
                        look=self._look,
                        wait=lambda work: aside.do(work, look),
                    )
                log = self.log
                self._to_disk(lambda: log.picture(self.step, "samples", pixels))

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        _exchange(self.ema, self.parameters)
        try:
            yield
        finally:
            _exchange(self.ema, self.parameters)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """A checkpoint of this step. Every process takes part: all learn whether the write failed."""
        with self._together():
            self._write()

    def _write(self) -> None:
        if self.is_main and self.step and self.saved != self.step and not self.aside.is_busy:
            self._write_now()

    def _write_now(self) -> None:
        self._require_finite()
        state = {
            "step": self.step,
            "position": self.position,
            **self.facts,
        }
        output = self.config.output

        def write(folder: Path) -> None:
            save_adapter(self.adapter, folder / ADAPTER)
            if self.ema:
                save_adapter(self.adapter, folder / EMA, weights=self.ema)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            write_file(folder / CONFIG, config_toml(self.config).encode())

        self._to_disk(
            lambda: write_checkpoint(
                self.folder, self.step, state, write, keep_last=output.keep_last, keep_every=output.keep_every
            )
        )
        self.saved = self.step

    def _require_finite(self) -> None:
        """An update may overflow though loss and gradient did not: such weights must not take the place of good ones."""
        broken = [
            name for kept in (self.parameters, self.ema) for name, t in kept.items() if not t.isfinite().all()
        ]
        if broken:
            raise NotFiniteError(
                f"step {self.step}: {len(broken)} weights are not finite ({some(broken)}). {advice_on_numbers(self.config.train)} "
                f"{self._what_is_kept()}"
            )

    def _load(self, start: Checkpoint) -> None:
        """The optimiser's state and the averaged weights of a checkpoint."""
        try:
            load_optimizer(self.optimizer, start.path / OPTIMIZER)
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{start.path}: the optimiser's state cannot be read ({error}). Remove this checkpoint to go on from the one before."
            ) from error
        for group in self.optimizer.param_groups:  # what the settings say, not what they said then
            group.update(betas=self.config.train.betas, weight_decay=self.config.train.weight_decay)
        if self.ema and (start.path / EMA).is_file():
            averaged = prepare_adapter(self.config, self.parts, start.path / EMA)
            _copy({name: p.detach() for name, p in trainable(averaged).items()}, self.ema)

    def _require_same(self, start: Checkpoint, allowed: bool) -> None:
        changed = [name for name, digest in self.facts.items() if self.state.get(name) != digest]
        if changed and not allowed:
            raise ConfigError(
                f"{start.path}: {' and '.join(_FACTS[name] for name in changed)} changed since this checkpoint, so the run would not "
                f"be the same one. {self._difference(start)}Change it back, start anew in another output.folder, or add "
                "--allow-config-change."
            )

    def _what_it_depends_on(self) -> dict[str, str]:
        """Digests of all that changes what a step does."""
        vision, detector = self.parts.networks.vision, self.parts.networks.detector
        return {
            "config": config_digest(self.config),
            "data": self.parts.index.digest,
            "base": self.parts.base.digest,
            "recognizer": self.parts.recognizer_digest,
            "vision": "" if vision is None else vision.digest,
            "detector": "" if detector is None else file_digest(detector.package.models[DETECTION]),
        }

    def _require_one_start(self, start: Checkpoint | None) -> None:
        """Raise TrainingError where the processes do not see the same files."""
        if self.world == 1:
            return
        mine = (0 if start is None else start.step, self.facts)
        seen: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(seen, mine)
        if any(other != seen[0] for other in seen):
            described = "; ".join(
                f"process {rank}: step {step}, {facts}" for rank, (step, facts) in enumerate(seen)
            )
            raise TrainingError(
                f"the processes of this run do not see the same files ({described}). output.folder, data and models must be on a "
                "file system that all machines share, or be the same on each."
            )

    def _difference(self, start: Checkpoint) -> str:
        """The settings that were others then, as far as they count."""
        path = start.path / CONFIG
        if not path.is_file():
            return ""
        found = differences(_what_counts(read_config(path)), _what_counts(self.config))
        return f"{some(found, 5)}. " if found else ""

    def _facts(self) -> dict[str, Any]:
        """Versions and digests, for people who want to repeat the run."""
        return {
            "versions": versions(),
            "commit": _commit(),
            "processes": self.world,
            "device": str(self.device),
            "data": {
                "index": self.parts.index.digest,
                "train": len(self.parts.train_rows),
                "test": len(self.parts.test_rows),
            },
            **{name: self.facts[name] for name in ("base", "recognizer", "vision", "detector")},
            "prediction": self.parts.base.schedule.prediction,
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
        }

    def _in_words(self) -> str:
        config = self.config
        branch = f" ({config.adapter.branch} branch)" if config.recipe.branches else ""
        count = sum(p.numel() for p in self.parameters.values())
        return (
            f"{config.method.title}{branch}, {count / 1e6:,.1f} M parameters, steps {self.step + 1} to "
            f"{config.train.steps} with {config.train.batch} samples each, {len(self.parts.train_rows)} photos, "
            f"{len(self.parts.test_rows)} more of test people; {self.world} process{'es' if self.world > 1 else ''} on {self.device.type}"
        )

    def close(self) -> None:
        if self.log is not None and not self.aside.is_busy:
            self._to_disk(self.log.close)
        self.aside.close()
        if self.bundle.injected is not None:
            self.bundle.injected.eject()
        # Where the others do not know that this process is leaving, taking leave of them would wait for ever.
        if self.is_settled:
            self.accelerator.end_training()


def has_accelerator() -> bool:
    """Whether there is a device other than the CPU."""
    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def learning_rate(config: RunConfig, step: int) -> float:
    """Of the update after `step` updates."""
    train = config.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup) / max(train.steps - train.warmup, 1)
    return train.lr * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


def config_digest(config: RunConfig) -> str:
    """Of all settings that change what a step does."""
    return sha256(config_toml(_what_counts(config)).encode()).hexdigest()[:16]


def _what_counts(config: RunConfig) -> RunConfig:
    """A configuration in which all that changes no step has its default."""
    kept = config
    if config.train.schedule == "constant":  # another one depends on where the run ends
        kept = replace(config, train=replace(config.train, steps=TrainConfig.steps))
    for section, names in _FREE.items():
        default = type(getattr(config, section))()
        free = {name: getattr(default, name) for name in names} if names is not None else None
        value = default if free is None else replace(getattr(kept, section), **free)
        kept = replace(kept, **{section: value})
    return kept


def _not_finite(done: Sequence[tuple[Batch, Mapping[str, Tensor]]]) -> str:
    """What to say of losses that are NaN or infinite, and whose they are; empty where there are none."""
    if all(torch.isfinite(torch.stack([losses["loss"] for _, losses in done])).tolist()):
        return ""
    named: list[str] = []
    others: list[str] = []
    for batch, losses in done:
        broken = ~torch.isfinite(losses["mse"]) | (losses["counts"] & ~torch.isfinite(losses["cosine"]))
        for source, timestep, is_broken in zip(
            batch.sources, batch.timesteps.tolist(), broken.tolist(), strict=True
        ):
            (named if is_broken else others).append(f"{source} (timestep {timestep})")
    return f"the loss is not finite, from {', '.join(named or others)}. Look at {'this photo' if len(named) == 1 else 'these photos'}."


def advice_on_numbers(train: TrainConfig) -> str:
    """What helps against numbers that are not finite, with these settings."""
    steps = [f"lower train.lr ({train.lr:g})"]
    steps.append(
        f"lower train.clip ({train.clip:g})" if train.clip else "set train.clip (1.0 is a common value)"
    )
    if not train.warmup:
        steps.append("set train.warmup")
    if train.precision != "no":
        steps.append(
            f'set train.precision = "no", which has 24 significant bits where {train.precision} has 8'
        )
    listed = f"{', '.join(steps[:-1])}, or {steps[-1]}."
    return listed[0].upper() + listed[1:]


def _kept(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "There is no checkpoint yet."
    return f"The checkpoint of step {checkpoint.step} is written."


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return bool(every) and (step % every == 0 or is_last)


@torch.no_grad()
def _exchange(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Each tensor of the first gets the values of the second and the other way round, one at a time."""
    for name, tensor in one.items():
        values = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(values)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _commit() -> str:
    """The commit of this package's repository, where it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


@contextlib.contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """SIGTERM and Ctrl+C: a checkpoint at the end of the step, then leave; once more: leave now. SIGUSR1: a checkpoint, and go on."""

    stopped_at = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal stopped_at
        if stopped_at and time.monotonic() - stopped_at > _INSIST:
            raise Terminated
        stopped_at = stopped_at or time.monotonic()
        run.signals.add("stop")

    def save(number: int, frame: object) -> None:
        run.signals.add("save")

    def interrupt(number: int, frame: object) -> None:
        if "stop" in run.signals or run.stops:
            raise KeyboardInterrupt
        sys.stderr.write(
            "\nstopping after this step, with a checkpoint; press Ctrl+C again to leave at once\n"
        )
        run.signals.add("stop")

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


__all__ = ["STOPPED", "advice_on_numbers", "config_digest", "learning_rate", "train"]
