"""Checkpoints of a run: folders that are complete or absent.

A checkpoint is written to a temporary folder, flushed to disk and renamed; only then are old ones removed. A crash or a full disk
therefore never harms the last good checkpoint. (accelerate removes before it writes.)

    run/
      checkpoints/step-00001000/   adapter.safetensors, optimizer.pt, state.json, ...
      checkpoints/step-00002000/
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, IDAdapterError
from ..files import flush

FOLDER = "checkpoints"
STATE = "state.json"
ADAPTER, EMA, OPTIMIZER = "adapter.safetensors", "ema.safetensors", "optimizer.pt"
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = re.compile(r"\.step-\d{8}\.[0-9]+\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The state saved by the run."""
        try:
            state: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: {STATE} cannot be read ({error}). Resume from an earlier checkpoint."
            ) from error
        return state


def checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first. Remains of interrupted writes are ignored."""
    folder = run / FOLDER
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else []
    whole = [Checkpoint(path, int(name[1])) for path, name in found if name and (path / STATE).is_file()]
    return sorted(whole, key=lambda checkpoint: checkpoint.step)


def latest(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run."""
    found = checkpoints(run)
    return found[-1] if found else None


def write_checkpoint(
    run: Path,
    step: int,
    state: Mapping[str, Any],
    write: Callable[[Path], None],
    *,
    keep_last: int = 3,
    keep_every: int = 0,
) -> Checkpoint:
    """Write the checkpoint of a step, then remove old ones.

    Args:
        state: plain values for `Checkpoint.state`.
        write: writes the other files into the given folder.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints at multiples of this step; 0: none.

    Raises:
        CheckpointError: the folder cannot be written. Existing checkpoints are untouched.
    """
    folder = run / FOLDER
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        temporary.mkdir()
        write(temporary)
        (temporary / STATE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        if final.exists():  # the same step again, after resuming from an earlier one
            old = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(final)
        flush(folder)
    except IDAdapterError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch.save reports a full disk as an archive that is too short
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error}). The earlier checkpoints are untouched; free some space and resume."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(run, keep_last, keep_every)
    return Checkpoint(final, step)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) or path.name.endswith(".old.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _prune(run: Path, keep_last: int, keep_every: int) -> None:
    for checkpoint in checkpoints(run)[:-keep_last]:
        if not keep_every or checkpoint.step % keep_every:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load an optimiser's state from a file. Raises torch's errors if the file is damaged or of another optimiser."""
    optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    # Clone on the CPU, where the tensors are views of the mapped file; other devices already have copies.
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                values[name] = value.clone()
