"""The stages of a build: what each needs and writes, and how it resumes.

A folder holds a build: `pictures/`, `checkpoints/` of trainings, `files/` to ship, `scores/` with measurements, and `logs/`. A finished stage
writes `done/STAGE.json`, which names its settings.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import replacing
from ..digests import write_record
from ..shipped import ASSETS
from .scores import Evidence, Measure
from .settings import Settings, TrainingSchedule


@dataclass(frozen=True)
class Workspace:
    """The folder of a build, and its options."""

    home: Path
    settings: Settings
    processes: int = 1  # that draw pictures and train adapters
    again: bool = False  # run finished stages again
    tokenizer: Path | None = None  # folder of CLIP's tokenizer, for the adapters

    @property
    def pictures(self) -> Path:
        return self.home / "pictures"

    @property
    def files(self) -> Path:
        return self.home / "files"

    def checkpoint(self, stage: str) -> Path:
        return self.home / "checkpoints" / f"{stage}.pt"

    def schedule(self, stage: str) -> TrainingSchedule:
        return self.settings.schedules[stage]

    def done(self, stage: str) -> Path:
        return self.home / "done" / f"{stage}.json"

    def log(self, stage: str, line: str) -> None:
        """Print a line of progress, and append it to the stage's log."""
        text = f"{time.strftime('%H:%M:%S')} {stage}: {line}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        path = self.home / "logs" / f"{stage}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def score(self, stage: str, scores: Mapping[str, object]) -> None:
        """Write the measurements of a stage."""
        write_json(self.home / "scores" / f"{stage}.json", scores)
        self.log(stage, json.dumps(scores))

    def scores(self, stage: str) -> dict[str, Any]:
        """Read the measurements of a stage. Raises InputError if there are none."""
        path = self.home / "scores" / f"{stage}.json"
        if not path.is_file():
            raise InputError(f"{path} is missing; run the stage `{stage}` first.")
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return content


@dataclass(frozen=True)
class Stage:
    """A step of a build."""

    name: str
    about: str
    needs: tuple[str, ...]  # stages that must be finished before
    work: Callable[[Workspace], None]
    ships: tuple[str, ...] = ()  # its files in `files/`, by their paths in the assets
    wanted: Mapping[str, float] | None = None  # minimum scores for shipping
    keeps: tuple[str, ...] = ()  # folders with its results so far, for stages without a training
    measure: Measure | None = None


def write_json(path: Path, content: Mapping[str, object]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", "utf-8", newline="\n")


def run_stages(stages: Mapping[str, Stage], names: Sequence[str], workspace: Workspace) -> None:
    """Run the named stages, or all in their order if none is named. Finished stages are skipped, interrupted ones resume.

    Raises:
        InputError: a stage is unknown or lacks one that it needs, or the folder holds a build with other settings.
    """
    _require_known(stages, names)
    _require_same_settings(workspace)
    for name in names or tuple(stages):
        stage = stages[name]
        for need in stage.needs:
            if not workspace.done(need).is_file():
                raise InputError(
                    f"the stage `{name}` needs the results of `{need}`; run that first, with the same --work."
                )
        if workspace.done(name).is_file() and not workspace.again:
            workspace.log(name, "already done; add --again to run it again")
            continue
        if workspace.done(name).is_file():
            _forget(stage, workspace)
        _run(stage, workspace)


def take_shipped(
    stages: Mapping[str, Stage], names: Sequence[str], workspace: Workspace, source: Path = ASSETS
) -> list[str]:
    """Take the shipped files as results of the stages that made them, but for the named ones, which are to be run.

    Returns the names of the stages taken. Those that are finished or begun are left as they are.

    Raises:
        InputError: no stage is named, or one is unknown, or the folder holds a build with other settings.
    """
    if not names:
        raise InputError("name the stages to run; the others are taken from the shipped files.")
    _require_known(stages, names)
    _require_same_settings(workspace)
    taken = []
    for name, stage in stages.items():
        is_shipped = bool(stage.ships) and all((source / file).is_file() for file in stage.ships)
        is_begun = workspace.done(name).is_file() or workspace.checkpoint(name).is_file()
        if not is_shipped or is_begun or name in names:
            continue
        for file in stage.ships:
            (workspace.files / file).parent.mkdir(parents=True, exist_ok=True)
            with replacing(workspace.files / file) as temporary:
                shutil.copyfile(source / file, temporary)
        write_json(workspace.done(name), {"settings": workspace.settings.name, "from": "shipped files"})
        workspace.log(name, "taken from the shipped files")
        taken.append(name)
    return taken


def describe(stages: Mapping[str, Stage], workspace: Workspace) -> str:
    """Return a line for each stage: its name, its state and its description."""
    lines = []
    for stage in stages.values():
        state = (
            "done"
            if workspace.done(stage.name).is_file()
            else "started"
            if workspace.checkpoint(stage.name).is_file()
            else ""
        )
        lines.append(f"{stage.name:18} {state:7} {stage.about}\n")
    return "".join(lines)


def _run(stage: Stage, workspace: Workspace) -> None:
    begun = time.monotonic()
    schedule = workspace.settings.schedules.get(stage.name)
    workspace.log(stage.name, "starts" if schedule is None else f"starts or resumes, {schedule.steps} steps")
    stage.work(workspace)
    if stage.measure is not None:
        sheets = workspace.home / "sheets"
        evidence = Evidence(workspace.files, workspace.pictures, workspace.settings, sheets)
        workspace.score(stage.name, stage.measure.scores(evidence))
    record = {"settings": workspace.settings.name, "seconds": round(time.monotonic() - begun)}
    write_json(
        workspace.done(stage.name), record | ({} if schedule is None else {"schedule": asdict(schedule)})
    )
    workspace.log(stage.name, f"done after {record['seconds']} s")


def _require_known(stages: Mapping[str, Stage], names: Sequence[str]) -> None:
    for name in names:
        if name not in stages:
            raise InputError(f"there is no stage {name!r}; choose from: {', '.join(stages)}.")


def _forget(stage: Stage, workspace: Workspace) -> None:
    workspace.done(stage.name).unlink()
    workspace.checkpoint(stage.name).unlink(missing_ok=True)
    for folder in stage.keeps:
        shutil.rmtree(workspace.home / folder, ignore_errors=True)


def _require_same_settings(workspace: Workspace) -> None:
    """Refuse a folder with a build of other settings: their pictures would be mixed."""
    path = workspace.home / "settings.json"
    everything = asdict(workspace.settings)
    mine = {name: everything[name] for name in ("name", "size", "groups", "seed")}
    if not path.is_file():
        write_json(path, mine)
    found = json.loads(path.read_text("utf-8"))
    if found != json.loads(json.dumps(mine)):
        raise InputError(
            f"{workspace.home} holds a build whose settings {found.get('name')!r} differ from the requested {workspace.settings.name!r}; "
            "choose another --work, or delete that folder."
        )


def ship(
    stages: Mapping[str, Stage], names: Sequence[str], workspace: Workspace, target: Path = ASSETS
) -> list[Path]:
    """Copy the files of finished stages to the assets of the package. Returns the copies.

    Raises:
        InputError: no stage is named, one is unknown, unfinished or has nothing to ship, or its scores are too low.
    """
    if not names:
        raise InputError("name the stages whose files are to be shipped.")
    copied = []
    for name in names:
        if name not in stages or not stages[name].ships:
            shipping = [stage.name for stage in stages.values() if stage.ships]
            raise InputError(f"the stage {name!r} has nothing to ship; choose from: {', '.join(shipping)}.")
        if not workspace.done(name).is_file():
            raise InputError(f"the stage {name!r} is not finished; run it first, without --ship.")
        is_measured = stages[name].measure is not None or stages[name].wanted
        scores = workspace.scores(name) if is_measured else {}
        for score, least in (stages[name].wanted or {}).items():
            if not scores.get(score, 0) >= least:
                raise InputError(
                    f"{name}: {score} is {scores.get(score)}, at least {least} is needed to ship it; train it longer (see settings.py)."
                )
        for file in stages[name].ships:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            with replacing(target / file) as temporary:
                shutil.copyfile(workspace.files / file, temporary)
            copied.append(target / file)
        write_record(target, name, stages[name].ships, scores)
    return copied
