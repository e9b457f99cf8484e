"""The engine: steps, processes, checkpoints. Devices, processes and reductions are accelerate's and torch.distributed's.

What a step does depends on its number, the weights and the optimiser's state alone (see `randomness`), so a run that goes on
from a checkpoint equals one that was never cut off. All processes agree before each update whether to go on: so none is left
waiting in a reduction for another that stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoint import save_adapter
from ..errors import CheckpointError, ConfigError, IDAdapterError, NotFiniteError, TrainingError
from ..extra import require
from .adapters import trainable
from .bundle import Bundle
from .cache import Cache, kinds
from .checkpoints import ADAPTER, EMA, OPTIMIZER, Checkpoint, latest, write_checkpoint
from .config import RunConfig, config_toml
from .grids import sample_grid
from .logs import RunLog, remaining
from .parts import load_parts, prepare_adapter
from .samples import VALIDATION, Batch, MicroBatches, Samples, collate, join

log = logging.getLogger(__name__)

CONFIG, FACTS = "config.toml", "run.json"
RESUME = ("never", "auto")
STOPPED = 143  # exit code after SIGTERM, as of a program that the signal ended
# What may differ in a run that goes on: none of it changes what a step does.
_FREE = {
    "train": ("steps", "accumulate", "checkpointing"),
    "data": ("workers", "cache", "max_bad_share"),
    "output": None,
}
_LIBRARIES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy")


def train(config: RunConfig, *, resume: str = "never", allow_config_change: bool = False) -> int:
    """A whole run, from its start or from its last checkpoint to its last step.

    Args:
        resume: "never" refuses a folder that holds checkpoints already; "auto" goes on from the newest one, if there is one.
        allow_config_change: go on although settings or data that change the result are others than before.

    Returns:
        the exit code: 0 when all steps are done, `STOPPED` when a signal ended the run after a checkpoint.

    Raises:
        IDAdapterError: settings, data, or the training itself; the last good checkpoint is there.
    """
    if resume not in RESUME:
        raise ConfigError(f"resume must be one of {', '.join(RESUME)}, got {resume!r}")
    start = latest(Path(config.output.folder))
    if start is not None and resume == "never":
        raise ConfigError(
            f"{config.output.folder} holds a run already (step {start.step}). Add `--resume auto` to go on with it, or set "
            "another output.folder."
        )
    run = _Run(config, start, allow_config_change)
    try:
        with _signals(run):
            return run.go()
    finally:
        run.close()


@dataclass
class _Interval:
    """What happened since the last line of the log. Tensors stay on the device until then."""

    mse: list[Tensor]
    cosine: list[Tensor]
    counts: list[Tensor]
    timesteps: list[Tensor]
    started: float
    waited: float = 0.0
    steps: int = 0
    gradient: float = 0.0

    @classmethod
    def fresh(cls) -> _Interval:
        return cls([], [], [], [], time.perf_counter())


class _Run:
    def __init__(self, config: RunConfig, start: Checkpoint | None, allow_config_change: bool) -> None:
        accelerate = require("accelerate")
        kwargs = require("accelerate.utils").DistributedDataParallelKwargs(
            find_unused_parameters=True,  # whose identity is dropped in a whole micro-batch
            broadcast_buffers=False,  # all of them are frozen
        )
        # Precision is ours: autocast over fp32 weights, and none around the face network. Without `cpu`, accelerate takes each of
        # several processes on a machine without accelerators for the only one.
        self.accelerator = accelerate.Accelerator(
            mixed_precision="no", cpu=not has_accelerator(), kwargs_handlers=[kwargs]
        )
        self.config = config
        self.folder = Path(config.output.folder)
        self.is_main = bool(self.accelerator.is_main_process)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        MicroBatches(config, 1, 0, rank=self.rank, world=self.world)  # refused before anything is loaded
        self.parts = load_parts(config, self.device)
        self.digest = config_digest(config)
        self.state = {} if start is None else start.state()
        if start is not None:
            self._require_same(start, allow_config_change)
        self.step = 0 if start is None else start.step
        self.adapter = prepare_adapter(config, self.parts, None if start is None else start.path / ADAPTER)
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
            self._load(start)
        if config.train.checkpointing:
            self.parts.base.unet.enable_gradient_checkpointing()
        self.model: nn.Module = self.accelerator.prepare(bundle)
        self.store = Cache(Path(config.data.cache), kinds(self.parts, config)) if config.data.cache else None
        self.stop_asked = self.save_asked = False
        self.saved = self.step if start is not None else -1
        self.log: RunLog | None = None
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(config_toml(config), encoding="utf-8")
            (self.folder / FACTS).write_text(json.dumps(self._facts(), indent=1), encoding="utf-8")
            self.log = RunLog(self.folder, self.step, config.train.steps, config.output.tensorboard)

    # ------------------------------------------------------------------------------------------------ the loop

    def go(self) -> int:
        config = self.config
        samples = self._samples(self.parts.train_rows)
        keys = MicroBatches(config, len(samples), self.step, rank=self.rank, world=self.world)
        loader = DataLoader(
            samples,
            batch_sampler=keys,
            collate_fn=collate,
            num_workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        interval = _Interval.fresh()
        if self.step == 0 and config.output.validate_every:
            self._validate()
        while self.step < config.train.steps:
            self._one_step(batches, interval)
            interval.steps += 1
            self.step += 1
            is_last = self.step == config.train.steps
            if self.step % config.output.log_every == 0 or is_last:
                self._write_log(interval)
                interval = _Interval.fresh()
            elif self.log is not None:
                self.log.advance()
            if _is_due(self.step, config.output.validate_every, is_last):
                self._validate()
            if _is_due(self.step, config.output.sample_every, is_last):
                self._sample()
            if self.step % config.output.save_every == 0 or is_last or self.stop_asked or self.save_asked:
                self.save_asked = False
                self._save()
            if self.stop_asked and not is_last:
                if self.is_main:
                    log.warning("stopped by a signal after step %d; the checkpoint is written", self.step)
                return STOPPED
        return 0

    def _one_step(self, batches: Iterator[Batch | IDAdapterError], interval: _Interval) -> None:
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        sources: list[str] = []
        failure: IDAdapterError | None = None
        for micro in range(train.accumulate):
            is_last = micro == train.accumulate - 1
            before = time.perf_counter()
            try:
                batch = next(batches)
            except Exception as error:  # whatever a worker does; the other processes must hear of it
                batch = TrainingError(f"step {self.step + 1}: the loader failed: {error}")
            if isinstance(batch, IDAdapterError):
                failure = batch
                break
            interval.waited += time.perf_counter() - before
            sources += batch.sources
            batch = batch.to(self.device)
            synchronized = contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model)
            with synchronized:
                losses: dict[str, Tensor] = self.model(batch)
                if not torch.isfinite(losses["loss"]):
                    failure = _not_finite(self.step, batch, losses)
                    break
                if is_last:
                    self._agree(None)
                self.accelerator.backward(losses["loss"] / train.accumulate)
            interval.mse.append(losses["mse"])
            interval.cosine.append(losses["cosine"])
            interval.counts.append(losses["counts"])
            interval.timesteps.append(batch.timesteps)
        if failure is not None:
            self._agree(failure)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), train.clip or float("inf")))
        if norm != norm or norm == float("inf"):
            raise NotFiniteError(
                f"step {self.step + 1}: the gradient is not finite. Photos of that step: {', '.join(sources)}. Look at them, lower "
                "train.lr, or set train.clip; then go on from the last checkpoint with --resume auto."
            )
        interval.gradient = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()

    def _agree(self, failure: IDAdapterError | None) -> None:
        """All processes hear of a failure or a signal in any of them, before the step's gradients are shared.

        Raises:
            the failure, or TrainingError in the processes that did not fail.
        """
        is_broken = isinstance(failure, NotFiniteError)
        said = [failure is not None, is_broken, self.stop_asked, self.save_asked]
        failed, is_broken, self.stop_asked, self.save_asked = self._any(said)
        if not failed:
            return
        # Where the numbers went wrong the weights may have, too; where a photo cannot be read nothing is lost.
        if self.step and not is_broken:
            self._write()
        if failure is None:
            raise TrainingError(f"step {self.step + 1}: another process failed; its own message says why.")
        raise failure

    def _any(self, said: list[bool]) -> list[bool]:
        """Each of these, true where it is so in any process."""
        if self.world == 1:
            return said
        values = torch.tensor(said, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

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
        together = [
            self.accelerator.gather(torch.cat(values))
            for values in (interval.mse, interval.cosine, interval.counts, interval.timesteps)
        ]
        if self.log is None:
            return
        mse, cosine, counts, timesteps = (values.float().cpu() for values in together)
        seconds = max(time.perf_counter() - interval.started, 1e-9)
        seen = cosine[counts > 0]
        deciles = (timesteps * 10 / self.parts.base.schedule.steps).long()
        speed = interval.steps / seconds
        left = (self.config.train.steps - self.step) / speed
        values: dict[str, Any] = {
            "loss": float(mse.mean()),
            "loss_by_decile": [float(mse[deciles == decile].mean()) for decile in range(10)],
            "identity": {
                "cosine": float(seen.mean()) if len(seen) else None,
                "share": len(seen) / len(counts),
            },
            "lr": learning_rate(self.config, self.step - 1),
            "gradient_norm": interval.gradient,
            "images_per_second": speed * self.config.train.batch,
            "data_wait_share": interval.waited / seconds,
            "seconds_left": left,
        }
        gates: dict[int, tuple[float, float]] = getattr(self.bundle.layers, "gate_values", dict)()
        if gates:
            values["gates"] = {str(site): list(pair) for site, pair in gates.items()}
        self.log.write(self.step, values)
        self.log.advance(loss=values["loss"], per_s=values["images_per_second"])
        log.info("step %d: loss %.4g, %s left", self.step, values["loss"], remaining(left))

    @torch.no_grad()
    def _validate(self) -> None:
        """The denoising error on fixed samples of people who are not trained on, with the adapter and without it."""
        rows = self.parts.test_rows or self.parts.train_rows
        samples = self._samples(rows)
        count = self.config.output.validate_samples
        keys = [(VALIDATION - number // len(rows), number % len(rows)) for number in range(count)]
        mine = keys[self.rank :: self.world]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with self._averaged():
            for first in range(0, len(mine), self.config.train.batch):
                batch = join([samples.sample(*key) for key in mine[first : first + self.config.train.batch]])
                with_adapter, alone = self.bundle.measure(batch.to(self.device))
                sums += torch.stack(
                    [with_adapter.double().sum(), alone.double().sum(), torch.full_like(sums[0], len(batch))]
                )
        sums = self.accelerator.reduce(sums, reduction="sum")
        if self.log is not None:
            error, alone, number = sums.tolist()
            self.log.write(
                self.step,
                {
                    "validation": {
                        "loss": error / number,
                        "loss_of_base": alone / number,
                        "samples": number,
                        "people": "test" if self.parts.test_rows else "train",
                    }
                },
            )

    def _sample(self) -> None:
        if self.log is not None:
            with self._averaged():
                pixels = sample_grid(
                    self.bundle, self.adapter, self.parts, self.config, self.folder, self.step
                )
            self.log.picture(self.step, "samples", pixels)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        if not self.ema:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            _copy(self.ema, self.parameters)
            yield
        finally:
            _copy(kept, self.parameters)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """A checkpoint of this step. Every process takes part: all learn whether the write failed."""
        error: CheckpointError | None = None
        if self.is_main:
            try:
                self._write()
            except CheckpointError as raised:
                error = raised
        (failed,) = self._any([error is not None])
        if error is not None:
            raise error
        if failed:
            raise TrainingError(f"step {self.step}: the main process could not write the checkpoint.")

    def _write(self) -> None:
        if not self.is_main or self.saved == self.step:
            return
        state = {
            "step": self.step,
            "position": self.step * self.config.train.batch,
            "config": self.digest,
            "data": self.parts.index.digest,
            "base": self.parts.base.digest,
        }
        output = self.config.output

        def write(folder: Path) -> None:
            save_adapter(self.adapter, folder / ADAPTER)
            if self.ema:
                with self._averaged():
                    save_adapter(self.adapter, folder / EMA)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            (folder / CONFIG).write_text(config_toml(self.config), encoding="utf-8")

        write_checkpoint(
            self.folder, self.step, state, write, keep_last=output.keep_last, keep_every=output.keep_every
        )
        self.saved = self.step

    def _load(self, start: Checkpoint) -> None:
        """The optimiser's state and the averaged weights of a checkpoint."""
        try:
            state = torch.load(start.path / OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{start.path}: the optimiser's state cannot be read ({error}). Remove this checkpoint to go on from the one before."
            ) from error
        if self.ema and (start.path / EMA).is_file():
            averaged = prepare_adapter(self.config, self.parts, start.path / EMA)
            _copy({name: p.detach() for name, p in trainable(averaged).items()}, self.ema)

    def _require_same(self, start: Checkpoint, allowed: bool) -> None:
        found = {
            "config": self.digest,
            "data": self.parts.index.digest,
            "base": self.parts.base.digest,
        }
        changed = [name for name, digest in found.items() if self.state.get(name) != digest]
        if changed and not allowed:
            what = {"config": "settings", "data": "the index of photos", "base": "the base model"}
            raise ConfigError(
                f"{start.path}: {' and '.join(what[name] for name in changed)} changed since this checkpoint, so the run would not "
                f"be the same one. {self._difference(start)}Change it back, start anew in another output.folder, or add "
                "--allow-config-change."
            )

    def _difference(self, start: Checkpoint) -> str:
        path = start.path / CONFIG
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        now = config_toml(self.config).splitlines()
        lines = [line for line in before if line not in now][:5]
        return f"Then it was: {'; '.join(lines)}. " if lines else ""

    def _facts(self) -> dict[str, Any]:
        """Versions and digests, for people who want to repeat the run."""
        versions = {"python": platform.python_version(), "platform": platform.platform()}
        for name in _LIBRARIES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        return {
            "versions": versions,
            "commit": _commit(),
            "processes": self.world,
            "device": str(self.device),
            "data": {
                "index": self.parts.index.digest,
                "train": len(self.parts.train_rows),
                "test": len(self.parts.test_rows),
            },
            "base": self.parts.base.digest,
            "recognizer": self.parts.recognizer_digest,
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
        }

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.bundle.injected is not None:
            self.bundle.injected.eject()
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
    kept = config
    for section, names in _FREE.items():
        default = type(getattr(config, section))()
        free = {name: getattr(default, name) for name in names} if names is not None else None
        value = default if free is None else replace(getattr(config, section), **free)
        kept = replace(kept, **{section: value})
    return sha256(config_toml(kept).encode()).hexdigest()[:16]


def _not_finite(step: int, batch: Batch, losses: Mapping[str, Tensor]) -> NotFiniteError:
    """What to say of a loss that is NaN or infinite: whose it is."""
    broken = ~torch.isfinite(losses["mse"]) | (losses["counts"] & ~torch.isfinite(losses["cosine"]))
    named = [source for source, bad in zip(batch.sources, broken.tolist(), strict=True) if bad]
    at = [
        f"{source} (timestep {int(t)})"
        for source, t, bad in zip(batch.sources, batch.timesteps, broken, strict=True)
        if bad
    ]
    return NotFiniteError(
        f"step {step + 1}: the loss is not finite, from {', '.join(at) or ', '.join(batch.sources)}. Look at "
        f"{'this photo' if len(named) == 1 else 'these photos'}, lower train.lr, set train.clip, or train without bf16; the last "
        "good checkpoint is kept: go on from it with --resume auto."
    )


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return bool(every) and (step % every == 0 or is_last)


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
    """SIGTERM: a checkpoint at the end of the step, then leave. SIGUSR1: a checkpoint, and go on."""

    def stop(number: int, frame: object) -> None:
        run.stop_asked = True

    def save(number: int, frame: object) -> None:
        run.save_asked = True

    wanted = {"SIGTERM": stop, "SIGUSR1": save}
    before: dict[int, Any] = {}
    for name, handler in wanted.items():
        if hasattr(signal, name):  # Windows has no SIGUSR1
            before[getattr(signal, name)] = signal.signal(getattr(signal, name), handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


__all__ = ["STOPPED", "config_digest", "learning_rate", "train"]
