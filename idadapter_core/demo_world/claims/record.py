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
from ..shipped import AUTOENCODER, BASE, JUDGE, READER, adapter_file
from .cases import Case

Numbers = Mapping[str, Estimate | None]
"""By metric; None where no picture counts."""
FILE = "claims.json"


def facts_of(case: Case, files: Path, judges: Collection[str]) -> dict[str, Any]:
    """What a measured case depends on, besides the plan: its pictures, the recognisers that judge, and the files of the world."""
    names = [BASE, AUTOENCODER, READER, JUDGE, *([adapter_file(case.adapter)] if case.adapter else [])]
    digests = {name: file_digest(files / name) for name in names if (files / name).is_file()}
    return {"case": repr(case.drawn), "judges": sorted(judges), "files": digests}


def is_covered(asked: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Whether what was measured answers what is asked: the same pictures, by at least the same judges."""
    others = [name for name in {*asked, *kept} if name != "judges"]
    same = all(asked.get(name) == kept.get(name) for name in others)
    return same and set(asked["judges"]) <= set(kept.get("judges", ()))


@dataclass(frozen=True)
class Record:
    """Measured cases of one plan.

    plan: how much is measured, and how it is drawn.
    cases: what each case was measured with, and its numbers, by name.
    """

    path: Path
    plan: dict[str, Any]
    cases: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any]) -> Record:
        """Open the record of a folder, or begin one.

        Raises:
            InputError: the folder holds a measurement of another plan, or the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return cls(path, plan, {})
        try:
            content = json.loads(path.read_text("utf-8"))
            kept, cases = content["plan"], content["cases"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path} is no record of a measurement; delete it, or choose another folder."
            ) from None
        if kept != plan:
            differing = ", ".join(sorted(name for name in {*kept, *plan} if kept.get(name) != plan.get(name)))
            raise InputError(
                f"{folder} holds a measurement with other settings ({differing}); choose another folder, or delete {FILE} there."
            )
        return cls(path, plan, cases)

    def find(self, asked: Mapping[str, Any], metrics: frozenset[str]) -> Numbers | None:
        """Return the numbers of a case that was measured with this, under any name; None if there are none, or metrics are missing."""
        for kept in self.cases.values():
            if is_covered(asked, kept["facts"]) and metrics <= set(kept["numbers"]):
                found = kept["numbers"]
                return {name: None if found[name] is None else Estimate(**found[name]) for name in metrics}
        return None

    def keep(self, name: str, facts: Mapping[str, Any], numbers: Numbers) -> None:
        """Add a case, and write the record. Other processes may have added cases since it was opened."""
        shown = {key: None if value is None else _rounded(value) for key, value in numbers.items()}
        if self.path.is_file():
            self.cases.update(Record.open(self.path.parent, self.plan).cases)
        self.cases[name] = {"facts": dict(facts), "numbers": shown}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            content = {"plan": self.plan, "cases": dict(sorted(self.cases.items()))}
            file.write_text(json.dumps(content, indent=1) + "\n", "utf-8", newline="\n")


def _rounded(value: Estimate) -> dict[str, Any]:
    return {
        name: round(number, 5) if isinstance(number, float) else number
        for name, number in asdict(value).items()
    }
