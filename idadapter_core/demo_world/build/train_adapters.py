"""Trains the demo world's adapters with the commands for users: scan, cache, train, export."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from ...errors import InputError, TrainingError
from ...toml import read_table
from ..shipped import CLIP_VISION, PACKAGE, adapter_file, face_package
from .stages import Workspace

ROOT, ROOT_PACKAGE = Path(__file__).parents[3], "idadapter_core"
CONFIGS = ROOT / "configs"
PHOTOS, INDEX, BASE_FOLDER, RECOGNIZER = "photos", "photos.parquet", "base", "recognizer.safetensors"
CACHE = "cache"  # of all runs: they share the latents, and those of one method the features


@dataclass(frozen=True)
class Ablation:
    """A training of IDAdapter without one of its parts or with other photos (Table 2 of its paper).

    both: settings of both parts of the training; without any, the first part is that of the full adapter.
    second: more settings of the second part.
    """

    both: tuple[str, ...] = ()
    second: tuple[str, ...] = ()


ABLATIONS: MappingProxyType[str, Ablation] = MappingProxyType(
    {
        "no_mff": Ablation(both=("adapter.settings.mixer_depth=0",)),
        "no_text": Ablation(both=("adapter.settings.text_encoders=[]",)),
        "no_id_loss": Ablation(second=("loss.identity=0.0",)),
        "own_photo": Ablation(second=("data.references=1", "data.own_photo=1.0")),
        "other_photos": Ablation(both=("data.references=4", "data.own_photo=0.0", "data.flip=true")),
    }
)
"""The trainings for measurements. `own_photo` is N = 1 of the paper: each photo is drawn from itself. `other_photos` never shows the photo to
draw."""


def scan_photos(workspace: Workspace) -> None:
    """Write the index of the photos."""
    own = workspace.files / PACKAGE
    _command(
        "scan", workspace.home / PHOTOS, workspace.home / INDEX, "--overwrite",
        "--face-package", own if workspace.settings.own_package else face_package(),
        "--recognizer", workspace.home / RECOGNIZER,
        *workspace.settings.scan,
    )  # fmt: skip


def train_adapter(workspace: Workspace, name: str, settings: Sequence[str] = (), run: str = "") -> Path:
    """Cache and train one run of `configs/demo_world_NAME.toml`, from its last checkpoint if there is one. Returns its folder.

    Args:
        settings: overrides ("section.key=value"), for ablations.
        run: name of the run's folder, if it differs from `name`.
    """
    if workspace.tokenizer is None:
        raise InputError(
            "captions are read by CLIP's tokenizer: name a folder with its vocab.json and merges.txt as --tokenizer, for example "
            "comfy/sd1_tokenizer of ComfyUI."
        )
    folder = workspace.home / "runs" / (run or name)
    paths = {
        "base.path": workspace.home / BASE_FOLDER,
        "base.tokenizer": workspace.tokenizer,
        "base.recognizer": workspace.home / RECOGNIZER,
        "data.index": workspace.home / INDEX,
        "data.cache": workspace.home / CACHE,
        "output.folder": folder,
    }
    if (vision := workspace.files / CLIP_VISION).is_dir():
        paths["base.vision"] = vision
    given = [f"{key}={path}" for key, path in paths.items()] + [*workspace.settings.training, *settings]
    config = ["--config", str(CONFIGS / f"demo_world_{name}.toml"), *(f"--set={entry}" for entry in given)]
    _command("cache", "build", *config, processes=workspace.processes)
    processes = _sharing(
        workspace.processes, CONFIGS / f"demo_world_{name}.toml", workspace.settings.training
    )
    _command("train", *config, "--resume", "auto", processes=processes)
    return folder


def _sharing(processes: int, config: Path, settings: Sequence[str]) -> int:
    """How many of the processes train: those that share the batch evenly; one where there is an accelerator, each of which runs one."""
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():
        return 1
    given = dict(entry.split("=", 1) for entry in settings)
    batch = int(given.get("train.global_batch_size", read_table(config)["train"]["global_batch_size"]))
    return math.gcd(processes, batch)


def train_further(
    workspace: Workspace, name: str, first: Path, settings: Sequence[str] = (), run: str = ""
) -> Path:
    """Like `train_adapter`, from the weights at the end of the run in the folder `first`."""
    start = workspace.home / f"{first.name}.safetensors"
    _export(first, start)
    return train_adapter(workspace, name, [f"adapter.start={start}", *settings], run)


def export_adapter(workspace: Workspace, name: str, run: Path, text_branch: Path | None = None) -> None:
    """Write the newest checkpoint of a run as the adapter's file, in half precision."""
    file = workspace.files / adapter_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    more: list[str | Path] = [] if text_branch is None else ["--text-branch", text_branch]
    _export(run, file, *more)


def _export(run: Path, file: Path, *more: str | Path) -> None:
    _command("export", run, file, "--overwrite", "--dtype", "fp16", *more)


def _command(name: str, *arguments: str | Path, processes: int = 1) -> None:
    """Run a command of this package in a process of its own, or in several by torchrun, with as many threads as this one.

    Raises:
        TrainingError: it failed; its own message is on the screen.
    """
    found = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{found}" if found else str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    modules = [*(launcher if processes > 1 else []), ROOT_PACKAGE]
    command = [sys.executable, "-m", *modules, name, *map(str, arguments)]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise TrainingError(f"`{name}` ended with exit code {code}; its message is above.")
