"""Checkpoints of a run: folders that are whole or not there.

A checkpoint is written into a temporary folder, flushed to the disk, renamed, and only then are old ones removed. So a run that
dies at any moment, or a disk that is full, leaves the last good checkpoint as it was. (accelerate removes before it writes.)

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
    """A whole checkpoint on the disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """What the run wrote about itself."""
        try:
            state: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: {STATE} cannot be read ({error}). Resume from an earlier checkpoint."
            ) from error
        return state


def checkpoints(run: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first. Remains of a write that was cut off are no checkpoints."""
    folder = run / FOLDER
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else []
    whole = [Checkpoint(path, int(name[1])) for path, name in found if name and (path / STATE).is_file()]
    return sorted(whole, key=lambda checkpoint: checkpoint.step)


def latest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run."""
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
        state: what `Checkpoint.state` gives back; plain values.
        write: puts the other files into the folder it is given.
        keep_last: how many of the newest stay.
        keep_every: those of steps that are a multiple of it stay, too; 0: none.

    Raises:
        CheckpointError: the folder cannot be written. What was there before is untouched.
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
        if final.exists():  # the same step again, after a resume from before it
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
    ) as error:  # torch.save says of a full disk that its archive came out too short
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
    """Give an optimiser the state in a file. Raises what torch does for a file that is damaged or of another optimiser."""
    optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    # On other devices it has copies now, on the CPU windows into the file.
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                values[name] = value.clone()
