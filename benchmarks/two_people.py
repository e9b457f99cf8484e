"""Two people in one picture of the demo world, by masks: is each region like its own person, and not like the other?

Each pair is drawn on a canvas of 256 x 128, with an identity for each half (Apply ID Adapter twice, with masks) and a prompt for each half
(Conditioning (Set Area)). Both halves are compared with other photos of both people, by a recogniser that the adapters were not trained
with. Controls: no identity, and both identities without masks.

    COMFYUI_PATH=... python -m benchmarks.two_people OUT [--pairs 30]

writes OUT/two_people.md, and the pictures of the first pairs of each case as a sheet.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idadapter_core.demo_world.build.sheets import write_sheet
from idadapter_core.demo_world.claims.judge import INDEPENDENT, Judge, Likeness
from idadapter_core.demo_world.claims.prompts import Prompt
from idadapter_core.demo_world.claims.report import shown_number
from idadapter_core.demo_world.claims.subjects import SIZE, Pixels, Subject, make_subjects
from idadapter_core.files import replacing
from idadapter_core.placeholders import CLASS_WORD
from idadapter_core.statistics import Estimate, estimate
from tests.harness.comfy import PACK_MODULE
from tests.harness.demo_scene import DemoScene, demo_scene

WIDTH, OVERLAP = 2 * SIZE, 16  # of the canvas, and by how much each half's prompt reaches into the other
PROMPTS = (
    Prompt(f"a photo of a {CLASS_WORD} facing the camera, at the beach", {}),
    Prompt(f"a photo of a {CLASS_WORD} smiling, facing the camera, in a forest", {}),
)
SHOWN = 6  # pairs on a sheet


@dataclass(frozen=True)
class Row:
    """A half of a picture: cosines to its own person and to the other one, None without a face."""

    pair: str
    own: float | None
    other: float | None


@dataclass(frozen=True)
class Case:
    """A way to draw a pair."""

    name: str
    title: str
    method: str = ""  # empty: no identity
    rescaled: bool = False
    masked: bool = True


CASES = (
    Case("none", "no identity"),
    Case("uniid_everywhere", "UniID, rescaled, without masks", "uniid", True, False),
    Case("uniid", "UniID, rescaled, with masks", "uniid", True),
    Case("uniid_naive", "UniID, naive, with masks", "uniid"),
    Case("idadapter_everywhere", "IDAdapter, without masks", "idadapter", masked=False),
    Case("idadapter", "IDAdapter, with masks", "idadapter"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure two people in one picture of the demo world.")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument(
        "--cases", nargs="*", default=[case.name for case in CASES], choices=[case.name for case in CASES]
    )
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs must be 1 or more, got {options.pairs}; try 30")
    torch.set_num_threads(1)
    logging.getLogger(PACK_MODULE).setLevel(logging.ERROR)  # the photos are small, as those of the training
    options.out.mkdir(parents=True, exist_ok=True)
    subjects = make_subjects(2 * options.pairs)
    judge = Judge.open()
    likeness = Likeness.of(judge, subjects)
    results = {}
    for case in (case for case in CASES if case.name in options.cases):
        rows = measured(case, subjects, judge, likeness, options.out)
        results[case.name] = summary(rows)
        print(line(case, results[case.name]), flush=True)
    path = options.out / "two_people.md"
    with replacing(path) as file:
        file.write_text(report(results, options.pairs), "utf-8", newline="\n")
    print(f"wrote {path}")
    return 0


def measured(
    case: Case, subjects: Sequence[Subject], judge: Judge, likeness: Likeness, out: Path
) -> list[Row]:
    """Draw and judge all pairs of a case."""
    rows: list[Row] = []
    shown: list[Pixels] = []
    for pair in range(len(subjects) // 2):
        drawn = [
            draw(demo_scene(), case, subjects[2 * pair : 2 * pair + 2], prompt, pair) for prompt in PROMPTS
        ]
        rows += judged(pair, drawn, judge, likeness)
        shown += drawn if pair < SHOWN else []
    write_sheet(np.stack(shown), out / f"{case.name}.webp", across=len(PROMPTS))
    return rows


def draw(scene: DemoScene, case: Case, pair: Sequence[Subject], prompt: Prompt, seed: int) -> Pixels:
    """Draw a pair of people side by side (128, 256, 3)."""
    model, prompts = scene.model, []
    for side, subject in enumerate(pair):
        if not case.method:
            prompts.append(scene.prompt(prompt.about(subject.person.sex)))
            continue
        identity = scene.identity(case.method, scene.features(subject.references))
        mask = torch.zeros(1, SIZE, WIDTH)
        mask[:, :, side * SIZE : (side + 1) * SIZE] = 1
        model = scene.applied(
            case.method,
            identity,
            rescaled=case.rescaled and side == len(pair) - 1,
            mask=mask if case.masked else None,
            model=model,
        )
        prompts.append(scene.prompt(prompt.text, identity, subject.person.sex))
    negative = scene.prompt("")
    return scene.draw(
        model, in_halves(prompts), 100 + seed, width=WIDTH, negative=in_halves([negative, negative])
    )[0]


def in_halves(prompts: Sequence[Any]) -> Any:
    """Combine a conditioning for the left half and one for the right half, which overlap a little."""
    import nodes as comfy_nodes

    width = SIZE + OVERLAP
    placed = [
        comfy_nodes.ConditioningSetArea().append(prompt, width, SIZE, x, 0, 1.0)[0]
        for prompt, x in zip(prompts, (0, WIDTH - width), strict=True)
    ]
    return comfy_nodes.ConditioningCombine().combine(*placed)[0]


def judged(pair: int, drawn: Sequence[Pixels], judge: Judge, likeness: Likeness) -> Iterator[Row]:
    """Compare each half of the pictures with both people."""
    people = likeness.own[INDEPENDENT][2 * pair : 2 * pair + 2]
    for side in (0, 1):
        halves = np.stack([picture[:, side * SIZE : (side + 1) * SIZE] for picture in drawn])
        for found in judge.likenesses(halves, judge.landmarks(halves), INDEPENDENT, people):
            own, other = (None, None) if found is None else (found[side], found[1 - side])
            yield Row(str(pair), own, other)


def summary(rows: Sequence[Row]) -> Mapping[str, Estimate | None]:
    """Means with intervals over pairs; None where no picture shows a face."""
    pairs = [row.pair for row in rows]
    differences = [None if row.own is None or row.other is None else row.own - row.other for row in rows]
    values: Mapping[str, Sequence[float | None]] = {
        "own": [row.own for row in rows],
        "other": [row.other for row in rows],
        "difference": differences,
        "right": [None if value is None else float(value > 0) for value in differences],
        "faces": [float(row.own is not None) for row in rows],
    }
    return {name: estimate(list(found), pairs) for name, found in values.items()}


def report(results: Mapping[str, Mapping[str, Estimate | None]], pairs: int) -> str:
    """The table."""
    titles = {case.name: case for case in CASES}
    head = (
        f"{pairs} pairs of people who were not met in training, {len(PROMPTS)} pictures of each. In brackets the 95 % interval over pairs.\n\n"
        "| | own person | other person | difference | nearer to its own | faces |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "".join(line(titles[name], found) + "\n" for name, found in results.items())


def line(case: Case, found: Mapping[str, Estimate | None]) -> str:
    """A row of the table."""
    return f"| {case.title} | " + " | ".join(map(shown_number, found.values())) + " |"


if __name__ == "__main__":
    sys.exit(main())
