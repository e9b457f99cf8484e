"""Measures the shipped files again, and compares their scores with the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ..digests import read_record
from .pictures import draw_pictures
from .scores import MEASURES, Evidence, Measure
from .settings import Settings

TOLERANCE = 0.02  # of a share: another processor rounds otherwise, and a few pictures of some hundred are read otherwise
_SHARES = 1.0  # scores above it are no shares (decibels, years) and may differ by TOLERANCE times their size


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
