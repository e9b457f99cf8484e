"""Trains the demo world's adapters with the commands that a user gives: scan, cache, train, export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType

from ...errors import InputError, TrainingError
from ..shipped import ADAPTERS, CLIP_VISION, FACE_PACKAGE, FACE_PACKAGES
from .stages import Workspace

CONFIGS = Path(__file__).parents[3] / "configs"
PHOTOS, INDEX, BASE_FOLDER, RECOGNIZER = "photos", "photos.parquet", "base", "recognizer.safetensors"
CACHES = MappingProxyType(
    {"uniid_adapter": "uniid", "uniid_text": "uniid", "idadapter": "idadapter", "faceid": "faceid"}
)
"""Folder of the cache of each run. UniID's branches read the same features."""

Command = Callable[[Sequence[str]], int]


def scan_photos(workspace: Workspace) -> None:
    """Write the index of the photos."""
    from ...cli.data import main

    _command(
        main,
        "scan", workspace.home / PHOTOS, workspace.home / INDEX, "--overwrite",
        "--face-package", workspace.files / FACE_PACKAGES / "models" / FACE_PACKAGE,
        "--recognizer", workspace.home / RECOGNIZER,
        *workspace.settings.scan,
    )  # fmt: skip


def train_adapter(workspace: Workspace, name: str, settings: Sequence[str] = (), run: str = "") -> Path:
    """Cache and train one run of `configs/demo_world_NAME.toml`, from its last checkpoint if there is one. Returns its folder.

    Args:
        settings: overrides ("section.key=value"), for ablations.
        run: name of the run's folder, if it differs from `name`.
    """
    from ...cli.cache import main as cache
    from ...cli.train import main as train

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
        "data.cache": workspace.home / "cache" / CACHES[name],
        "output.folder": folder,
    }
    if name == "idadapter":
        paths["base.vision"] = workspace.files / CLIP_VISION
    given = [f"{key}={path}" for key, path in paths.items()] + [*workspace.settings.training, *settings]
    config = ["--config", str(CONFIGS / f"demo_world_{name}.toml"), *(f"--set={entry}" for entry in given)]
    _command(cache, "build", *config)
    _command(train, *config, "--resume", "auto")
    return folder


def export_adapter(workspace: Workspace, name: str, run: Path, text_branch: Path | None = None) -> None:
    """Write the newest checkpoint of a run as the adapter's file, in half precision."""
    from ...cli.export import main

    file = workspace.files / ADAPTERS / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    more: list[str | Path] = [] if text_branch is None else ["--text-branch", text_branch]
    _command(main, run, file, "--overwrite", "--dtype", "fp16", *more)


def _command(main: Command, *arguments: str | Path) -> None:
    if code := main([str(argument) for argument in arguments]):
        raise TrainingError(
            f"`{' '.join(map(str, arguments[:2]))} …` ended with exit code {code}; see above."
        )
