"""A measurement from the command line: worlds, people, cases, tables and sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import InputError
from ...files import replacing
from ..shipped import JUDGE
from ..world import open_world
from .cases import SHORT, Case, all_cases
from .draw import Measurement, Plan
from .judge import OUTSIDE
from .prompts import PROMPTS
from .record import Record, facts_of
from .report import METRICS, report, summarize, write_grid

PLAN_NAMES = ("people", "prompts", "seeds")
PLAN, SHORT_PLAN = (100, 12, 2), (12, 6, 1)


def measure(
    folder: Path,
    files: Path,
    *,
    people: int,
    prompts: int,
    seeds: int,
    names: Sequence[str] | None,
    is_short: bool,
    dtype: str = "float32",
    log: Callable[[str], None],
) -> Path:
    """Measure cases and write `claims.md`, `claims.json` and a sheet of each case. Returns the path of the table.

    The table has every case that was measured with these files, also by an earlier call.

    Args:
        folder: results; cases measured before are not measured again. Its `claims.json` alone is enough for that.
        files: of a build, or the shipped ones.
        names: cases to measure; None: all, or the main ones if `is_short`.
        dtype: "float32" or "bfloat16" of the UNet.

    Raises:
        InputError: an unknown case, more prompts than there are, or a folder with a measurement of other numbers.
        CheckpointError: a file is missing or damaged.
    """
    if prompts > len(PROMPTS):
        raise InputError(f"there are {len(PROMPTS)} prompts, got {prompts}; choose a smaller number.")
    plan = Plan(people, seeds, PROMPTS[:prompts], dtype)
    chosen = _chosen(names, is_short)
    record = Record.open(folder, plan.facts)
    measurement = Measurement(open_world(files), plan, folder)
    for case in chosen:
        facts = measurement.facts(case)
        if record.find(facts, frozenset(METRICS)) is None:
            rows = measurement.rows(case, log)
            if rows is not None:
                record.keep(case.name, facts, summarize(rows))
                write_grid(folder, case.name)
    path = folder / "claims.md"
    with replacing(path) as file:
        file.write_text(tables(record, files), "utf-8", newline="\n")
    return path


def tables(record: Record, files: Path) -> str:
    """The tables of all cases that were measured with these files, in Markdown."""
    results = {}
    for case in all_cases():
        if (numbers := record.find(facts_of(case, files, ()), frozenset(METRICS))) is not None:
            results[case.name] = numbers
    return report(results, _about(record, files))


def _chosen(names: Sequence[str] | None, is_short: bool) -> Sequence[Case]:
    if not names:
        return SHORT if is_short else all_cases()
    known = {case.name: case for case in all_cases()}
    for name in names:
        if name not in known:
            raise InputError(f"there is no case {name!r}; choose from: {', '.join(known)}.")
    return [known[name] for name in names]


def _about(record: Record, files: Path) -> str:
    plan = record.plan
    drawn = "one picture" if plan["seeds"] == 1 else f"{plan['seeds']} pictures"
    judge = (
        "a recogniser of another form, trained on other people"
        if (files / JUDGE).is_file()
        else "the adapters' own recogniser, which favours them"
    )
    judges = {name for kept in record.cases.values() for name in kept["facts"]["judges"]}
    outside = " dlib judges the first picture of each prompt in the main cases." if OUTSIDE in judges else ""
    return (
        f"{plan['people']} people who were not met in training, {len(plan['prompts'])} prompts, {drawn} of each. In brackets the 95 % "
        f"interval over people. ID-Sim is the cosine to the mean of the person's other photos by {judge}."
        f"{outside} Drawn with {plan['sampler']}, {plan['steps']} steps, CFG {plan['cfg']:g}, in {plan['dtype']}."
    )
