"""Turns measured pictures into numbers with intervals over people (likeness, prompt accuracy, leakage, diversity), tables and sheets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...statistics import Estimate, estimate
from ..build.sheets import write_sheet
from .cases import ABLATIONS, ANCHORS, FACEID, IDADAPTER, UNIID, Case, fronts, mixtures
from .draw import PictureRow
from .judge import INDEPENDENT, OUTSIDE, OWN
from .prompts import LEAKING, followed
from .record import Numbers

Value = Callable[[PictureRow], float | None]


def _accuracy(row: PictureRow) -> float:
    return followed({name: value for name, value in row.expected.items() if name != "sex"}, row.read)


def _of_factor(factor: str) -> Value:
    return lambda row: float(row.read[factor] == row.expected[factor]) if factor in row.expected else None


def _returns(factor: str) -> Value:
    """Whether the reference's class returns although the prompt does not name the factor."""
    return lambda row: float(row.read[factor] == row.reference[factor]) if factor in row.reference else None


def _differs(factor: str) -> Value:
    found = _returns(factor)

    def value(row: PictureRow) -> float | None:
        returned = found(row)
        return None if returned is None else 1 - returned

    return value


def _likeness(recognizer: str) -> Value:
    return lambda row: row.likeness.get(recognizer)


def _beats_impostor(recognizer: str) -> Value:
    """Whether the picture is nearer to the person than to another one of the same look."""

    def value(row: PictureRow) -> float | None:
        likeness, impostor = row.likeness.get(recognizer), row.impostor.get(recognizer)
        return None if likeness is None or impostor is None else float(likeness > impostor)

    return value


METRICS: Mapping[str, tuple[str, Value]] = {
    "likeness": ("ID-Sim", _likeness(INDEPENDENT)),
    "likeness_own": ("ID-Sim, adapters' recogniser", _likeness(OWN)),
    "likeness_outside": ("ID-Sim, dlib", _likeness(OUTSIDE)),
    "beats_impostor": ("nearer than impostor", _beats_impostor(INDEPENDENT)),
    "beats_impostor_outside": ("nearer than impostor, dlib", _beats_impostor(OUTSIDE)),
    "accuracy": ("prompt", _accuracy),
    **{
        name: (name, _of_factor(name))
        for name in ("style", "expression", "direction", "background", "accessory", "sex")
    },
    "expression_diversity": ("Expr-Div", _differs("expression")),
    "direction_diversity": ("Pose-Div", _differs("direction")),
    **{f"{name}_returns": (f"{name} returns", _returns(name)) for name in LEAKING},
    "found": ("faces", lambda row: float(row.likeness[INDEPENDENT] is not None)),
}
"""By name: title, and the value of a picture, None where it does not count."""

JUDGES = ("likeness", "likeness_own", "likeness_outside", "beats_impostor", "beats_impostor_outside")
SECTIONS: tuple[tuple[str, tuple[Case, ...], tuple[str, ...]], ...] = (
    ("Anchors", ANCHORS, ("likeness", "beats_impostor", "accuracy", "expression", "direction", "found")),
    (
        "IDAdapter: photos and parts",
        (*IDADAPTER, *ABLATIONS),
        ("likeness", "beats_impostor", "accuracy", "expression_diversity", "direction_diversity"),
    ),
    (
        "UniID: branches and rescaling",
        UNIID,
        ("likeness", "beats_impostor", "accuracy", "expression", "style", "accessory"),
    ),
    (
        "Leakage: how often the reference's class returns where the prompt is silent",
        (*ANCHORS, *UNIID, *IDADAPTER, *FACEID),
        tuple(f"{name}_returns" for name in LEAKING),
    ),
    (
        "Rescaling a foreign adapter",
        FACEID,
        ("likeness", "beats_impostor", "accuracy", "expression", "style"),
    ),
    ("By other recognisers", (*ANCHORS, *UNIID, *IDADAPTER, *FACEID), JUDGES),
    ("Identity against prompt, over scales", tuple(fronts()), ("likeness", "beats_impostor", "accuracy")),
    ("Mixing photos", tuple(mixtures()), ("likeness", "beats_impostor", "accuracy", "expression_diversity")),
)


def summarize(rows: Sequence[PictureRow]) -> Numbers:
    """The mean of each metric over pictures, with its interval over people."""
    people = [row.person for row in rows]
    return {name: estimate([value(row) for row in rows], people) for name, (_, value) in METRICS.items()}


def report(results: Mapping[str, Numbers], about: str) -> str:
    """The tables of measured cases, in Markdown; a table has only the rows that were measured."""
    parts = [about]
    for title, cases, metrics in SECTIONS:
        measured = [case for case in cases if case.name in results]
        if measured:
            parts.append(_table(title, measured, metrics, results))
    return "\n\n".join(parts) + "\n"


def _table(title: str, cases: Sequence[Case], metrics: Sequence[str], results: Mapping[str, Numbers]) -> str:
    heads = " | ".join(METRICS[name][0] for name in metrics)
    lines = [f"## {title}", "", f"| | {heads} |", f"| --- |{' --- |' * len(metrics)}"]
    for case in cases:
        values = " | ".join(shown_number(results[case.name][name]) for name in metrics)
        lines.append(f"| {case.title} | {values} |")
    return "\n".join(lines)


def shown_number(value: Estimate | None) -> str:
    """A mean with its interval, for a table."""
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def write_grid(folder: Path, name: str) -> Path:
    """Write a sheet of a case's kept pictures, a row for each person: a reference photo, then the prompts in their order."""
    shown = np.load(folder / "cases" / f"{name}.npy")
    path = folder / "grids" / f"{name}.webp"
    write_sheet(shown.reshape(-1, *shown.shape[2:]), path, across=shown.shape[1])
    return path
