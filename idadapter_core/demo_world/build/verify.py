"""Checks the shipped files against their record: what they contain, and what they score when they are measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files import replacing
from .pictures import draw_pictures
from .scores import MEASURES, Evidence, Measure
from .settings import Settings

RECORD = "record.json"  # among the assets
TOLERANCE = 0.02  # of a share: another processor rounds otherwise, and a few pictures of some hundred are read otherwise
_SHARES = 1.0  # scores above it are no shares (decibels, years) and may differ by TOLERANCE times their size

Content = dict[str, dict[str, Any]]


def write_record(assets: Path, stage: str, files: Sequence[str], scores: Mapping[str, float]) -> None:
    """Record the digests of a stage's shipped files, and their scores."""
    content = read_record(assets) if (assets / RECORD).is_file() else {}
    content[stage] = {"files": {name: _sha256(assets / name) for name in files}, "scores": dict(scores)}
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
            elif (found := _sha256(path)) != wanted:
                problems.append(
                    f"{name} ({stage}) has the SHA-256 {found[:12]}… and not {wanted[:12]}…; get this project again"
                )
    return problems


def changed_scores(
    assets: Path,
    work: Path,
    settings: Settings,
    processes: int,
    log: Callable[[str], None],
    measures: Mapping[str, Measure] = MEASURES,
) -> list[str]:
    """Measure the shipped files again, and describe each score that differs from the record.

    Args:
        work: folder for the pictures, which are drawn where they are not there yet.
        log: gets a line for each stage.
    """
    record = {stage: entry for stage, entry in read_record(assets).items() if stage in measures}
    groups = {group for stage in record for group in measures[stage].groups}
    draw_pictures(
        work / "pictures", settings, processes, log, [name for name in settings.groups if name in groups]
    )
    evidence, problems = Evidence(assets, work / "pictures", settings), []
    for stage, entry in record.items():
        found = measures[stage].scores(evidence)
        log(f"{stage}: {json.dumps(found)}")
        for name, wanted in entry["scores"].items():
            value = found.get(name)
            if value is None or abs(value - wanted) > TOLERANCE * max(_SHARES, abs(wanted)):
                problems.append(f"{stage}: {name} is {value}, the record says {wanted}")
    return problems


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
