"""The record of the shipped files: their digests, and what they scored when they were shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import replacing, sha256_of

RECORD = "record.json"  # among the assets

Content = dict[str, dict[str, Any]]


def write_record(assets: Path, stage: str, files: Sequence[str], scores: Mapping[str, float]) -> None:
    """Record the digests of a stage's shipped files, and their scores."""
    content = read_record(assets) if (assets / RECORD).is_file() else {}
    content[stage] = {"files": {name: sha256_of(assets / name) for name in files}, "scores": dict(scores)}
    with replacing(assets / RECORD) as file:
        file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8", newline="\n")


def read_record(assets: Path) -> Content:
    """Read the digests and scores of all shipped stages.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    path = assets / RECORD
    try:
        content: Content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get this project again.") from error
    return content


def changed_files(assets: Path) -> list[str]:
    """Describe each shipped file that is missing or differs from the record."""
    problems = []
    for stage, entry in read_record(assets).items():
        for name, wanted in entry["files"].items():
            path = assets / name
            if not path.is_file():
                problems.append(f"{name} ({stage}) is missing; get this project again")
            elif (found := sha256_of(path)) != wanted:
                problems.append(
                    f"{name} ({stage}) has the SHA-256 {found[:12]}… and not {wanted[:12]}…; get this project again"
                )
    return problems
