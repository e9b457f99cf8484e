"""Provenance of a run: digests that identify it on resume, and facts for repeating it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import config_toml, fixed_settings
from ..errors import ConfigError, TrainingError
from ..extra import versions
from ..faces.packages import DETECTION
from ..files import file_digest, some
from .checkpoints import Checkpoint
from .config import RunConfig, differences, read_record
from .parts import Parts
from .ranks import Ranks
from .state import CONFIG

FACTS = "run.json"
_NAMES = {
    "config": "settings",
    "data": "the index of photos",
    "base": "the base model",
    "recognizer": "the face network",
    "vision": "CLIP vision",
    "detector": "the face detector",
}


def config_digest(config: RunConfig) -> str:
    """Digest of all settings that affect a step."""
    return sha256(config_toml(fixed_settings(config)).encode()).hexdigest()[:16]


def digests(config: RunConfig, parts: Parts) -> dict[str, str]:
    """Digests of everything that affects a step."""
    vision, detector = parts.networks.vision, parts.networks.detector
    return {
        "config": config_digest(config),
        "data": parts.index.digest,
        "base": parts.base.digest,
        "recognizer": parts.recognizer_digest,
        "vision": "" if vision is None else vision.digest,
        "detector": "" if detector is None else file_digest(detector.package.models[DETECTION]),
    }


def require_same(
    config: RunConfig, now: Mapping[str, str], start: Checkpoint, then: Mapping[str, Any]
) -> None:
    """Check that a checkpoint belongs to the same run.

    Args:
        now: the digests of this run.
        then: the checkpoint's state, with the digests of its run.

    Raises:
        ConfigError: names everything that changed.
    """
    changed = [name for name, digest in now.items() if then.get(name) != digest]
    path = start.path / CONFIG
    before = read_record(path) if "config" in changed and path.is_file() else None
    if before is not None and config_digest(before) == now["config"]:
        changed.remove("config")  # only setting names have changed since then
    if changed:
        raise ConfigError(
            f"{start.path}: {' and '.join(_NAMES[name] for name in changed)} changed since this checkpoint, so the run would not "
            f"be the same one. {_difference(before, config)}Change it back, start anew in another output.folder, or add "
            "--allow-config-change."
        )


def require_one_start(ranks: Ranks, start: Checkpoint | None, now: Mapping[str, str]) -> None:
    """Raise TrainingError if the processes see different files."""
    seen = ranks.gathered((0 if start is None else start.step, dict(now)))
    if any(other != seen[0] for other in seen):
        described = "; ".join(
            f"process {rank}: step {step}, {facts}" for rank, (step, facts) in enumerate(seen)
        )
        raise TrainingError(
            f"the processes of this run do not see the same files ({described}). output.folder, data and models must be on a "
            "file system that all machines share, or be the same on each."
        )


def facts(
    parts: Parts, ranks: Ranks, now: Mapping[str, str], parameters: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Versions and digests, for repeating the run."""
    return {
        "versions": versions(),
        "commit": _commit(),
        "processes": ranks.world,
        "device": str(ranks.device),
        "data": {
            "index": parts.index.digest,
            "train": len(parts.train_rows),
            "test": len(parts.test_rows),
        },
        **{name: now[name] for name in ("base", "recognizer", "vision", "detector")},
        "prediction_type": parts.base.schedule.prediction_type,
        "trained_parameters": sum(p.numel() for p in parameters.values()),
    }


def describe(
    config: RunConfig, parts: Parts, ranks: Ranks, parameters: Mapping[str, Tensor], step: int
) -> str:
    """Describe the run in a sentence: method, parameters, steps, data, devices."""
    branch = f" ({config.adapter.branch} branch)" if config.recipe.branches else ""
    count = sum(p.numel() for p in parameters.values())
    return (
        f"{config.method.title}{branch}, {count / 1e6:,.1f} M parameters, steps {step + 1} to "
        f"{config.train.steps} with {config.train.global_batch_size} samples each, {len(parts.train_rows)} photos, "
        f"{len(parts.test_rows)} more of test people; {ranks.world} process{'es' if ranks.world > 1 else ''} on {ranks.device.type}"
    )


def _difference(before: RunConfig | None, now: RunConfig) -> str:
    """Describe the changed settings that affect a step."""
    found = differences(fixed_settings(before), fixed_settings(now)) if before is not None else []
    return f"{some(found, 5)}. " if found else ""


def _commit() -> str:
    """Commit of this package's repository, if it is one."""
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


__all__ = ["FACTS", "config_digest", "describe", "digests", "facts", "require_one_start", "require_same"]
