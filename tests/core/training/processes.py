"""Trainings in processes of their own, and the weights that they wrote."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from idadapter_core.config import config_toml
from idadapter_core.training.checkpoints import ADAPTER, checkpoints
from tests.harness.shim import shim_path
from tests.tiny.toy import Toy

ROOT = Path(__file__).resolve().parents[3]
METHODS = {
    "idadapter": {},
    "uniid adapter": {"adapter": {"method": "uniid"}},
    "uniid text": {"adapter": {"method": "uniid", "branch": "text"}},
}


def weights(run: Path, step: int | None = None, name: str = ADAPTER) -> dict[str, torch.Tensor]:
    found = [c for c in checkpoints(run) if step in (None, c.step)]
    return load_file(found[-1].path / name)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


class Process:
    """A training in processes of its own."""

    def __init__(
        self,
        toy: Toy,
        folder: Path,
        *arguments: str,
        processes: int = 1,
        wrapper: Sequence[str] = (),
        **sections: dict[str, Any],
    ):
        self.config = folder.parent / f"{folder.name}.toml"
        self.config.write_text(config_toml(toy.config(folder, **sections)), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        program = ["-m", "idadapter_core", "train", "--config", str(self.config), *arguments]
        path = os.pathsep.join(str(p) for p in (shim_path(), ROOT) if p)
        self.log = (folder.parent / f"{folder.name}.log").open("wb+")
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, *(launcher if processes > 1 else []), *program],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> tuple[int, str]:
        try:
            code = self.process.wait(timeout=240)
        finally:
            self.kill()
        self.log.seek(0)
        return code, self.log.read().decode(errors="replace")

    def kill(self) -> None:
        """The process and all that it started, which the launcher puts into sessions of their own."""
        for process in reversed(self.family()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def wait_for(condition: Any, process: Process) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.process.poll() is None, process.wait()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
