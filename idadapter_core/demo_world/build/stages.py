"""The stages of a build: what each needs, what it makes, and where it goes on after a stop.

A folder holds a build: `pictures/`, `checkpoints/` of trainings in progress, `files/` to be shipped, `scores/` of what was measured,
`logs/`. A finished stage leaves `done/STAGE.json`, which names the settings it was made with.
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
from ..shipped import ASSETS
from .settings import Settings, TrainingSchedule


@dataclass(frozen=True)
class Workspace:
    """Where a build is made, and how."""

    home: Path
    settings: Settings
    processes: int = 1
    again: bool = False  # make finished stages once more

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
        """Say how far a stage is: on the screen, and in its log."""
        text = f"{time.strftime('%H:%M:%S')} {stage}: {line}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        path = self.home / "logs" / f"{stage}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def score(self, stage: str, scores: Mapping[str, object]) -> None:
        """Keep what was measured."""
        write_json(self.home / "scores" / f"{stage}.json", scores)
        self.log(stage, json.dumps(scores))

    def scores(self, stage: str) -> dict[str, Any]:
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
    needs: tuple[str, ...]  # stages that must be done before
    work: Callable[[Workspace], None]
    ships: tuple[str, ...] = ()  # what it leaves in `files/`, by the path among the assets
    wanted: Mapping[str, float] | None = None  # least scores with which it may be shipped
    keeps: tuple[str, ...] = ()  # folders of what it has finished so far, for stages that are no trainings


def write_json(path: Path, content: Mapping[str, object]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", "utf-8", newline="\n")


def run_stages(stages: Mapping[str, Stage], names: Sequence[str], workspace: Workspace) -> None:
    """Do these stages, or all of them in their order where none is named. Those that are done are passed over.

    A stage that was stopped goes on where it was.

    Raises:
        InputError: a stage is unknown or lacks one it needs, or the folder holds a build with other settings.
    """
    for name in names:
        if name not in stages:
            raise InputError(f"there is no stage {name!r}; choose from: {', '.join(stages)}.")
    _require_same_settings(workspace)
    for name in names or tuple(stages):
        stage = stages[name]
        for need in stage.needs:
            if not workspace.done(need).is_file():
                raise InputError(
                    f"the stage `{name}` needs what `{need}` makes; run that first, with the same --work."
                )
        if workspace.done(name).is_file() and not workspace.again:
            workspace.log(name, "done before; add --again to make it once more")
            continue
        if workspace.done(name).is_file():
            _forget(stage, workspace)
        _run(stage, workspace)


def describe(stages: Mapping[str, Stage], workspace: Workspace) -> str:
    """A line for each stage."""
    lines = []
    for stage in stages.values():
        state = (
            "done"
            if workspace.done(stage.name).is_file()
            else "begun"
            if workspace.checkpoint(stage.name).is_file()
            else ""
        )
        lines.append(f"{stage.name:18} {state:6} {stage.about}\n")
    return "".join(lines)


def _run(stage: Stage, workspace: Workspace) -> None:
    begun = time.monotonic()
    schedule = workspace.settings.schedules.get(stage.name)
    workspace.log(stage.name, "begins" if schedule is None else f"begins or goes on, {schedule.steps} steps")
    stage.work(workspace)
    record = {"settings": workspace.settings.name, "seconds": round(time.monotonic() - begun)}
    write_json(
        workspace.done(stage.name), record | ({} if schedule is None else {"schedule": asdict(schedule)})
    )
    workspace.log(stage.name, f"done after {record['seconds']} s")


def _forget(stage: Stage, workspace: Workspace) -> None:
    workspace.done(stage.name).unlink()
    workspace.checkpoint(stage.name).unlink(missing_ok=True)
    for folder in stage.keeps:
        shutil.rmtree(workspace.home / folder, ignore_errors=True)


def _require_same_settings(workspace: Workspace) -> None:
    """One folder, one build: pictures of other numbers would be mixed."""
    path = workspace.home / "settings.json"
    everything = asdict(workspace.settings)
    mine = {name: everything[name] for name in ("name", "size", "groups", "seed")}
    if not path.is_file():
        write_json(path, mine)
    found = json.loads(path.read_text("utf-8"))
    if found != json.loads(json.dumps(mine)):
        raise InputError(
            f"{workspace.home} holds a build with the settings {found.get('name')!r} of other numbers than the {workspace.settings.name!r} asked "
            "for; choose another --work, or delete that folder."
        )


def ship(
    stages: Mapping[str, Stage], names: Sequence[str], workspace: Workspace, target: Path = ASSETS
) -> list[Path]:
    """Copy what finished stages made to the assets of the package.

    Raises:
        InputError: a stage is unknown, makes nothing to ship, or its scores are below those that it must reach.
    """
    if not names:
        raise InputError("name the stages whose files are to be shipped.")
    copied = []
    for name in names:
        if name not in stages or not stages[name].ships:
            shipping = [stage.name for stage in stages.values() if stage.ships]
            raise InputError(f"the stage {name!r} makes nothing to ship; choose from: {', '.join(shipping)}.")
        scores = workspace.scores(name)
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
    return copied
