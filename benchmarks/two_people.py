"""Two people in one picture of the demo world, by masks: is each region like its own person, and not like the other?

Each pair is drawn on a canvas of 256 x 128, with an identity for each half (Apply ID Adapter twice, with masks) and a prompt for each half
(Conditioning (Set Area)). Both halves are compared with other photos of both people, by a recogniser that the adapters were not trained
with. Controls: no identity, and both identities without masks.

    COMFYUI_PATH=... python -m benchmarks.two_people OUT [--pairs 30]

writes OUT/two_people.md, two_people.json and a sheet of the first pairs for each case. Measured pairs are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idadapter_core.demo_world.build.sheets import write_sheet
from idadapter_core.demo_world.claims.judge import INDEPENDENT, Judge, Likeness
from idadapter_core.demo_world.claims.subjects import Subject, make_subjects
from idadapter_core.files import replacing
from idadapter_core.placeholders import CLASS_WORD
from idadapter_core.statistics import Estimate, estimate
from tests.harness.comfy import PACK_MODULE
from tests.harness.demo_scene import SIDE, DemoScene, Pixels, demo_scene

WIDTH, OVERLAP = 2 * SIDE, 16  # of the canvas, and by how much each half's prompt reaches into the other
TEXTS = (
    f"a photo of a {CLASS_WORD} facing the camera, at the beach",
    f"a photo of a {CLASS_WORD} smiling, facing the camera, in a forest",
)
SHOWN = 6  # pairs on a sheet
Row = dict[str, Any]


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
    """Draw and judge all pairs of a case, except those that are kept."""
    path = out / f"{case.name}.json"
    rows: list[Row] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    done = {row["pair"] for row in rows}
    shown = []
    for pair in range(len(subjects) // 2):
        if pair in done:
            continue
        drawn = [draw(demo_scene(), case, subjects[2 * pair : 2 * pair + 2], text, pair) for text in TEXTS]
        rows += judged(pair, drawn, judge, likeness)
        shown += drawn
        with replacing(path) as file:
            file.write_text(json.dumps(rows) + "\n", "utf-8", newline="\n")
        if pair + 1 == min(SHOWN, len(subjects) // 2):
            write_sheet(np.stack(shown), out / f"{case.name}.jpg", across=len(TEXTS))
    return rows


def draw(scene: DemoScene, case: Case, pair: Sequence[Subject], text: str, seed: int) -> Pixels:
    """Draw a pair of people side by side (128, 256, 3)."""
    model, prompts = scene.model, []
    for side, subject in enumerate(pair):
        wording = text.replace(CLASS_WORD, subject.person.sex)
        if not case.method:
            prompts.append(scene.prompt(wording))
            continue
        identity = scene.identity(case.method, scene.features(subject.references))
        mask = torch.zeros(1, SIDE, WIDTH)
        mask[:, :, side * SIDE : (side + 1) * SIDE] = 1
        model = scene.applied(
            case.method,
            identity,
            rescaled=case.rescaled and side == len(pair) - 1,
            mask=mask if case.masked else None,
            model=model,
        )
        prompts.append(scene.prompt(text, identity, subject.person.sex))
    negative = scene.prompt("")
    return scene.draw(
        model, in_halves(prompts), 100 + seed, width=WIDTH, negative=in_halves([negative, negative])
    )[0]


def in_halves(prompts: Sequence[Any]) -> Any:
    """Combine a conditioning for the left half and one for the right half, which overlap a little."""
    import nodes as comfy_nodes

    width = SIDE + OVERLAP
    placed = [
        comfy_nodes.ConditioningSetArea().append(prompt, width, SIDE, x, 0, 1.0)[0]
        for prompt, x in zip(prompts, (0, WIDTH - width), strict=True)
    ]
    return comfy_nodes.ConditioningCombine().combine(*placed)[0]


def judged(pair: int, drawn: Sequence[Pixels], judge: Judge, likeness: Likeness) -> list[Row]:
    """Compare each half of the pictures with both people."""
    rows: list[Row] = []
    for side in (0, 1):
        halves = np.stack([picture[:, side * SIDE : (side + 1) * SIDE] for picture in drawn])
        landmarks = judge.landmarks(halves)
        directions = judge.directions(halves, landmarks, INDEPENDENT)
        people = likeness.own[INDEPENDENT][2 * pair : 2 * pair + 2]
        for place, points in enumerate(landmarks):
            found = (
                [None, None] if points is None else [float(directions[place] @ person) for person in people]
            )
            rows.append(
                {"pair": pair, "side": side, "text": place, "own": found[side], "other": found[1 - side]}
            )
    return rows


def summary(rows: Sequence[Row]) -> Mapping[str, Estimate | None]:
    """Means with intervals over pairs."""
    pairs = [str(row["pair"]) for row in rows]
    seen = [row for row in rows if row["own"] is not None]

    def mean(values: Sequence[float | None]) -> Estimate | None:
        return estimate(list(values), pairs)

    assert seen, "no face in any picture"
    differences = [None if row["own"] is None else row["own"] - row["other"] for row in rows]
    return {
        "own": mean([row["own"] for row in rows]),
        "other": mean([row["other"] for row in rows]),
        "difference": mean(differences),
        "right": mean([None if value is None else float(value > 0) for value in differences]),
        "faces": mean([float(row["own"] is not None) for row in rows]),
    }


def report(results: Mapping[str, Mapping[str, Estimate | None]], pairs: int) -> str:
    """The table."""
    titles = {case.name: case for case in CASES}
    head = (
        f"{pairs} pairs of people who were not met in training, {len(TEXTS)} pictures of each. In brackets the 95 % interval over pairs.\n\n"
        "| | own person | other person | difference | nearer to its own | faces |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "".join(line(titles[name], found) + "\n" for name, found in results.items())


def line(case: Case, found: Mapping[str, Estimate | None]) -> str:
    """A row of the table."""
    return f"| {case.title} | " + " | ".join(map(number, found.values())) + " |"


def number(value: Estimate | None) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
