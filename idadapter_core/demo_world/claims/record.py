"""The numbers of measured cases, in one small file: a measurement goes on with it on another machine, without the pictures."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import file_digest, replacing
from ...statistics import Estimate
from ..shipped import (
    AUTOENCODER,
    BASE,
    DETECTOR_FILE,
    JUDGE,
    PACKAGE,
    READER,
    RECOGNIZER_FILE,
    VISION_WEIGHTS,
    adapter_file,
)
from .cases import Case

Numbers = Mapping[str, Estimate | None]
"""By metric; None where no picture counts."""
FILE = "claims.json"
WORLD_FILES = (
    BASE,
    AUTOENCODER,
    READER,
    JUDGE,
    VISION_WEIGHTS,
    f"{PACKAGE}/{DETECTOR_FILE}",
    f"{PACKAGE}/{RECOGNIZER_FILE}",
)


class Digests:
    """Digests of the world's files, each computed once."""

    def __init__(self, files: Path) -> None:
        self._files = files
        self._known: dict[str, str | None] = {}

    def of(self, name: str) -> str | None:
        """Digest of a file by its name among the assets; None if it is not there."""
        if name not in self._known:
            path = self._files / name
            self._known[name] = file_digest(path) if path.is_file() else None
        return self._known[name]


def facts_of(case: Case, digests: Digests, judges: Collection[str]) -> dict[str, Any]:
    """What a measured case depends on, besides the plan: its pictures, the recognisers that judge, and the files of the world."""
    names = [*WORLD_FILES, *([adapter_file(case.adapter)] if case.adapter else [])]
    found = {name: digest for name in names if (digest := digests.of(name)) is not None}
    return {"case": repr(case.drawn), "judges": sorted(judges), "files": found}


def is_covered(asked: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Whether what was measured answers what is asked: the same pictures, by at least the same judges.

    An adapter that is not there any more cannot have changed.
    """
    others = [name for name in {*asked, *kept} if name not in ("judges", "files")]
    same = all(asked.get(name) == kept.get(name) for name in others)
    differing = {
        name
        for name in {*asked["files"], *kept["files"]}
        if asked["files"].get(name) != kept["files"].get(name)
    }
    missing = {name for name in kept["files"] if name not in asked["files"] and name not in WORLD_FILES}
    return same and differing <= missing and set(asked["judges"]) <= set(kept["judges"])


@dataclass(frozen=True)
class Kept:
    """A measured case: what it was measured with, and its numbers."""

    facts: Mapping[str, Any]
    numbers: Numbers


@dataclass(frozen=True)
class Record:
    """Measured cases of one plan, by name."""

    path: Path
    plan: Mapping[str, Any]
    cases: Mapping[str, Kept]

    @classmethod
    def open(cls, folder: Path, plan: Mapping[str, Any]) -> Record:
        """Open the record of a folder, or begin one.

        Raises:
            InputError: the folder holds a measurement of another plan, or the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return cls(path, plan, {})
        kept, cases = read_record(path)
        if kept != plan:
            differing = ", ".join(sorted(name for name in {*kept, *plan} if kept.get(name) != plan.get(name)))
            raise InputError(
                f"{folder} holds a measurement with other settings ({differing}); choose another folder, or delete {FILE} there."
            )
        return cls(path, plan, cases)

    def find(self, name: str, asked: Mapping[str, Any], metrics: frozenset[str]) -> Numbers | None:
        """Return the numbers of a case that was measured with this: its own, or of another that draws the same, with the most judges.

        None if there are none, or metrics are missing.
        """
        fitting = [
            (key == name, len(kept.facts["judges"]), kept.numbers)
            for key, kept in self.cases.items()
            if is_covered(asked, kept.facts) and metrics <= set(kept.numbers)
        ]
        if not fitting:
            return None
        *_, numbers = max(fitting, key=lambda one: one[:2])
        return {metric: numbers[metric] for metric in metrics}

    def keep(self, name: str, facts: Mapping[str, Any], numbers: Numbers) -> Record:
        """Write the record with one more case. Another process may have added cases since this one was opened: they are kept."""
        others = Record.open(self.path.parent, self.plan).cases
        cases = dict(sorted({**others, name: Kept(facts, numbers)}.items()))
        shown = {key: {"facts": one.facts, "numbers": _shown(one.numbers)} for key, one in cases.items()}
        with replacing(self.path) as file:
            content = json.dumps({"plan": self.plan, "cases": shown}, indent=1)
            file.write_text(content + "\n", "utf-8", newline="\n")
        return Record(self.path, self.plan, cases)


def read_record(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Kept]]:
    """Read the plan and the cases of a record.

    Raises:
        InputError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        cases = {name: _read(case) for name, case in content["cases"].items()}
        plan = dict(content["plan"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} is no record of a measurement; delete it, or choose another folder."
        ) from None
    return plan, cases


def _read(case: Mapping[str, Any]) -> Kept:
    facts = dict(case["facts"])
    known = {"case": str(facts["case"]), "judges": list(facts["judges"]), "files": dict(facts["files"])}
    numbers = case["numbers"].items()
    return Kept(known, {name: None if value is None else Estimate(**value) for name, value in numbers})


def _shown(numbers: Numbers) -> dict[str, Any]:
    return {name: None if value is None else _rounded(value) for name, value in numbers.items()}


def _rounded(value: Estimate) -> dict[str, Any]:
    return {
        name: round(number, 5) if isinstance(number, float) else number
        for name, number in asdict(value).items()
    }
