"""The demo: photos in, pictures of that person out, in a real ComfyUI server without a screen.

`python tasks.py demo` runs it after setting everything up; `python -m tests.demo` alone needs COMFYUI_PATH.

It runs workflows/demo_world.json once for each prompt, with all files from the pack itself: a person whom no network was trained on,
and both methods. Every picture is measured by networks that the adapters were not trained with.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from idadapter_core.demo_world.claims.judge import INDEPENDENT, Judge, Likeness
from idadapter_core.demo_world.claims.prompts import PROMPTS, Prompt, followed
from idadapter_core.demo_world.claims.subjects import Subject, asked_factors, make_subjects, true_pictures
from idadapter_core.demo_world.portraits import draw_portraits
from tests.harness.comfy import REPOSITORY
from tests.harness.server import ComfyServer, ServerError
from tests.harness.workflow import Workflow, api_workflow

WORKFLOW = REPOSITORY / "workflows" / "demo_world.json"
OUTPUT = REPOSITORY / "output" / "demo"
PREFIX = "demo_world/"
METHODS: Mapping[str, str] = {
    "base": "the model alone",
    "naive": "UniID, naive",
    "rescaled": "UniID, rescaled",
    "idadapter": "IDAdapter, four photos",
}
"""Titles by the names of saved pictures, in the order of the sheet."""
TRUE = "true"  # rendered as asked: the best that can be reached
TILE, LINE, MARGIN, HEAD = 168, 20, 16, 220  # pixels of the sheet
LEAST_GAIN = 0.1  # of likeness over the model alone; docs/claims.md has the usual distances, which are several times as large
GOOD, POOR, INK, PAPER = (0, 120, 50), (180, 50, 30), (30, 30, 30), (255, 255, 255)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Score:
    """What a picture shows: cosine to the person's other photos, None without a face; and the share of the prompt that it follows."""

    likeness: float | None
    prompt: float


@dataclass(frozen=True)
class Check:
    """One thing the demo must show."""

    claim: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"  {'ok  ' if self.holds else 'FAIL'}  {self.claim}: {self.measured}"


class Scorer:
    """Measures pictures of one person."""

    def __init__(self, subject: Subject) -> None:
        self._judge = Judge.open()
        self._own = Likeness.of(self._judge, [subject]).own[INDEPENDENT]

    def scores(self, pictures: Pixels, prompts: Sequence[Prompt]) -> list[Score]:
        """Measure pictures (N, 128, 128, 3), one for each prompt."""
        landmarks, read = self._judge.landmarks(pictures), self._judge.read(pictures)
        found = self._judge.likenesses(pictures, landmarks, INDEPENDENT, self._own)
        return [
            Score(
                None if likeness is None else likeness[0],
                followed(prompt.classes, seen),
            )
            for likeness, prompt, seen in zip(found, prompts, read, strict=True)
        ]


class Runs:
    """The demo's workflow on a server, with other prompts and settings."""

    def __init__(self, server: ComfyServer, person: int) -> None:
        self._server = server
        self._workflow: Workflow = api_workflow(json.loads(WORKFLOW.read_text("utf-8")))
        (drawn,) = self._nodes("IDAdapterDemoPerson")
        drawn["inputs"]["person"] = person
        self.seconds = 0.0

    def turn_off(self) -> None:
        """Set every strength to 0, and give all samplers the prompt without identity."""
        for node in self._nodes("IDAdapterApply"):
            node["inputs"]["weight"] = 0.0
        (plain,) = (
            node
            for node in self._nodes("KSampler")
            if self._kind_of(node["inputs"]["positive"]) == "CLIPTextEncode"
        )
        for node in self._nodes("KSampler"):
            node["inputs"]["positive"] = plain["inputs"]["positive"]

    def _kind_of(self, link: Sequence[Any]) -> str:
        return str(self._workflow[link[0]]["class_type"])

    def _nodes(self, kind: str) -> list[dict[str, Any]]:
        return [node for node in self._workflow.values() if node["class_type"] == kind]

    def pictures(self, prompt: str, anew: bool = False) -> dict[str, Pixels]:
        """Run the workflow. Returns the picture (128, 128, 3) of each method.

        Args:
            anew: whether nothing may come from the server's caches.
        """
        if anew:
            self._server.free()
        for node in self._nodes("PrimitiveStringMultiline"):
            node["inputs"]["value"] = prompt
        result = self._server.run(self._workflow, timeout=600).check()
        self.seconds += result.seconds
        saved = {
            node["inputs"]["filename_prefix"].removeprefix(PREFIX): number
            for number, node in self._workflow.items()
            if node["class_type"] == "SaveImage"
        }
        return {
            name: np.asarray(result.images_by_node[number][0].convert("RGB"))
            for name, number in saved.items()
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw a person who does not exist with both methods, in a real ComfyUI server."
    )
    parser.add_argument("--person", type=int, default=3, help="number of the person (default 3)")
    parser.add_argument(
        "--prompts", type=int, default=len(PROMPTS), help=f"how many prompts (default {len(PROMPTS)})"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the pictures")
    options = parser.parse_args(arguments)
    if not 1 <= options.prompts <= len(PROMPTS):
        parser.error(
            f"there are {len(PROMPTS)} prompts, got --prompts {options.prompts}; choose 1 to {len(PROMPTS)}"
        )
    prompts = PROMPTS[: options.prompts]
    print("Starting ComfyUI ...", flush=True)
    try:
        with ComfyServer() as server:
            return show(server, options.person, prompts, options.output)
    except (ServerError, AssertionError) as error:
        print(f"\nThe demo failed:\n{error}")
        return 1


def show(server: ComfyServer, person: int, prompts: Sequence[Prompt], folder: Path) -> int:
    """Run the workflows, write the pictures and print what happened; the exit status."""
    system = json.loads(server.get("/system_stats"))["system"]
    ours = [node for node in server.object_info() if node.startswith("IDAdapter")]
    print(
        f"ComfyUI {system['comfyui_version']}, Python {system['python_version'].split()[0]}, PyTorch "
        f"{system['pytorch_version']}: up after {server.boot_seconds:.1f} s with {len(ours)} nodes of this pack.",
        flush=True,
    )
    torch.set_num_threads(1)  # beside the server, and for tiny networks
    runs = Runs(server, person)
    drawn: dict[str, list[Pixels]] = {name: [] for name in METHODS}
    for number, prompt in enumerate(prompts, 1):
        for name, picture in runs.pictures(prompt.text).items():
            drawn[name].append(picture)
        print(f"  {number} of {len(prompts)}: {prompt.text}", flush=True)
    taken = runs.seconds
    (subject,) = make_subjects(1, person)  # the person of Draw Demo Person, with other photos
    pictures = {name: np.stack(found) for name, found in drawn.items()}
    pictures[TRUE] = true_pictures(
        subject, [asked_factors(prompt.classes, place) for place, prompt in enumerate(prompts)]
    )
    scorer = Scorer(subject)
    scores = {name: scorer.scores(found, prompts) for name, found in pictures.items()}
    checks = [*picture_checks(runs, prompts, drawn), *score_checks(scores)]
    sheet = write(folder, person, subject, prompts, pictures, scores)
    print(f"\n{len(prompts) * len(METHODS)} pictures in {taken:.0f} s. On average:")
    for name, found in scores.items():
        print(f"  {title_of(name):24} identity {mean_likeness(found):.2f}   prompt {mean_prompt(found):.0%}")
    print("\nChecks\n" + "\n".join(map(str, checks)))
    print(f"\nLook at {sheet}\nOr open workflows/demo_world.json in ComfyUI (python tasks.py serve).")
    return 0 if all(check.holds for check in checks) else 1


def title_of(name: str) -> str:
    return METHODS.get(name, "true rendering")


def mean_likeness(scores: Sequence[Score]) -> float:
    """Mean cosine; a picture without a face is like nobody."""
    return float(np.mean([score.likeness or 0.0 for score in scores]))


def mean_prompt(scores: Sequence[Score]) -> float:
    return float(np.mean([score.prompt for score in scores]))


def picture_checks(runs: Runs, prompts: Sequence[Prompt], drawn: Mapping[str, list[Pixels]]) -> list[Check]:
    """What must hold of the pictures themselves: strength 0 is the model alone, and nothing depends on what ran before."""
    text = prompts[0].text
    again = runs.pictures(text, anew=True)
    runs.turn_off()
    zero = runs.pictures(text)
    differences = {name: _difference(zero[name], drawn["base"][0]) for name in METHODS if name != "base"}
    repeated = max(_difference(again[name], drawn[name][0]) for name in METHODS)
    return [
        Check(
            "strength 0 is exactly the model alone",
            f"largest difference {max(differences.values())}",
            not max(differences.values()),
        ),
        Check("the same seed gives the same picture", f"largest difference {repeated}", not repeated),
    ]


def _difference(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(np.int16) - other).max())


def score_checks(scores: Mapping[str, Sequence[Score]]) -> list[Check]:
    """What must hold of the scores."""
    identity = {name: mean_likeness(found) for name, found in scores.items()}
    prompt = {name: mean_prompt(found) for name, found in scores.items()}
    return [
        Check(
            f"{title_of(name)}: more like the person than the model alone",
            f"{identity[name]:.2f} against {identity['base']:.2f}",
            identity[name] > identity["base"] + LEAST_GAIN,
        )
        for name in METHODS
        if name != "base"
    ] + [
        Check(
            "rescaling keeps the prompt",
            f"{prompt['rescaled']:.0%} against {prompt['base']:.0%}",
            prompt["rescaled"] > prompt["base"] - 0.15,
        )
    ]


# --- the sheet -------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    person: int,
    subject: Subject,
    prompts: Sequence[Prompt],
    pictures: Mapping[str, Pixels],
    scores: Mapping[str, Sequence[Score]],
) -> Path:
    """Save every picture and the sheet. Returns the sheet's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in pictures.items():
        for number, picture in enumerate(found, 1):
            Image.fromarray(picture).save(folder / f"{name}_{number:02}.png")
    _, photos = draw_portraits(person, 4)
    sheet = contact_sheet(photos, subject.person.sex, prompts, pictures, scores)
    path = folder / "sheet.png"
    sheet.save(path)
    return path


def contact_sheet(
    photos: Pixels,
    sex: str,
    prompts: Sequence[Prompt],
    pictures: Mapping[str, Pixels],
    scores: Mapping[str, Sequence[Score]],
) -> Image.Image:
    """The photos, and below them a row of pictures for each method, with a column for each prompt."""
    names = [*METHODS, TRUE]
    side, wording = 2 * TILE, 5 * LINE
    row = TILE + LINE + MARGIN
    width = HEAD + len(prompts) * (TILE + MARGIN // 2) + MARGIN
    width = max(width, HEAD + len(photos) * (side + MARGIN // 2) + MARGIN)
    top = MARGIN + side + MARGIN
    sheet = Image.new("RGB", (width, top + wording + len(names) * row), PAPER)
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(size=14), ImageFont.load_default(size=20)
    draw.multiline_text(
        (MARGIN, MARGIN), "Photos of a person\nwho does not exist,\nunseen in training", INK, large
    )
    for place, photo in enumerate(photos):
        _paste(sheet, photo, HEAD + place * (side + MARGIN // 2), MARGIN, side)
    for place, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt.about(sex), 24)[:5]
        draw.multiline_text((_left(place), top), "\n".join(lines), INK, small)
    for number, name in enumerate(names):
        y = top + wording + number * row
        about = f"identity {mean_likeness(scores[name]):.2f}\nprompt {mean_prompt(scores[name]):.0%}"
        draw.multiline_text((MARGIN, y + MARGIN), "\n".join(textwrap.wrap(title_of(name), 18)), INK, large)
        draw.multiline_text((MARGIN, y + MARGIN + 3 * LINE), about, INK, large)
        for place, (picture, score) in enumerate(zip(pictures[name], scores[name], strict=True)):
            _paste(sheet, picture, _left(place), y, TILE)
            _write_score(draw, score, scores[TRUE][place], (_left(place), y + TILE + 2), small)
    return sheet


def _left(place: int) -> int:
    return HEAD + place * (TILE + MARGIN // 2)


def _paste(sheet: Image.Image, picture: Pixels, x: int, y: int, side: int) -> None:
    sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))


def _write_score(
    draw: ImageDraw.ImageDraw, score: Score, best: Score, at: tuple[int, int], font: Any
) -> None:
    """Write both numbers: green if the likeness is at least half of the true rendering's, and if the whole prompt is read."""
    x, y = at
    is_like = score.likeness is not None and score.likeness >= 0.5 * (best.likeness or 1.0)
    likeness = "no face" if score.likeness is None else f"id {score.likeness:.2f}"
    draw.text((x, y), likeness, GOOD if is_like else POOR, font)
    draw.text((x + TILE // 2, y), f"prompt {score.prompt:.0%}", GOOD if score.prompt == 1 else POOR, font)


if __name__ == "__main__":
    sys.exit(main())
