"""A measurement from the command line: worlds, people, cases, tables and sheets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import InputError
from ...files import replacing
from ..shipped import JUDGE
from ..world import open_world
from .cases import SHORT, Case, all_cases
from .draw import Measurement, Plan
from .prompts import PROMPTS
from .record import Digests, Record, facts_of
from .report import METRICS, report, summarize, write_grid

NAMES = frozenset(METRICS)
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
    world = open_world(files)
    # diffusers' own `to` warns of something that it then does
    nn.Module.to(world.base.unet, getattr(torch, dtype))
    measurement = Measurement(world, plan, folder)
    for case in chosen:
        facts = measurement.facts(case)
        record = Record.open(folder, plan.facts)  # another process may have measured the case
        if record.find(case.name, facts, NAMES) is None:
            rows = measurement.rows(case, log)
            if rows is not None:
                write_grid(folder, case.name)
                record = record.keep(case.name, facts, summarize(rows))
    path = folder / "claims.md"
    with replacing(path) as file:
        file.write_text(tables(record, files), "utf-8", newline="\n")
    return path


def tables(record: Record, files: Path) -> str:
    """The tables of all cases that were measured with these files, in Markdown."""
    digests, results = Digests(files), {}
    for case in all_cases():
        numbers = record.find(case.name, facts_of(case, digests, ()), NAMES)
        if numbers is not None:
            results[case.name] = numbers
    has_outside = any(numbers["likeness_outside"] is not None for numbers in results.values())
    return report(results, _about(record.plan, digests, has_outside))


def _chosen(names: Sequence[str] | None, is_short: bool) -> Sequence[Case]:
    if not names:
        return SHORT if is_short else all_cases()
    known = {case.name: case for case in all_cases()}
    for name in names:
        if name not in known:
            raise InputError(f"there is no case {name!r}; choose from: {', '.join(known)}.")
    return [known[name] for name in names]


def _about(plan: Mapping[str, Any], digests: Digests, has_outside: bool) -> str:
    drawn = "one picture" if plan["seeds"] == 1 else f"{plan['seeds']} pictures"
    judge = (
        "the adapters' own recogniser, which favours them"
        if digests.of(JUDGE) is None
        else "a recogniser of another form, trained on other people"
    )
    outside = " dlib judges the first picture of each prompt in the main cases." if has_outside else ""
    return (
        f"{plan['people']} people who were not met in training, {len(plan['prompts'])} prompts, {drawn} of each. In brackets the 95 % "
        f"interval over people. ID-Sim is the cosine to the mean of the person's other photos by {judge}."
        f"{outside} Drawn with {plan['sampler']}, {plan['steps']} steps, CFG {plan['cfg']:g}, in {plan['dtype']}."
    )
