"""Draws the picture of results in docs/demo_world.md: people whom no network was trained on, by UniID with rescaling.

    COMFYUI_PATH=... python -m tests.harness.results_picture

writes docs/images/results.webp. Nothing is chosen by hand: the people are the first of the measurements, with one seed.
"""

from __future__ import annotations

import logging
import sys

import torch
from PIL import Image

from idadapter_core.demo_world.claims.prompts import PROMPTS
from idadapter_core.demo_world.claims.subjects import Pixels, Subject, make_subjects
from tests.harness.comfy import PACK_MODULE, REPOSITORY
from tests.harness.demo_scene import demo_scene

PICTURE = REPOSITORY / "docs" / "images" / "results.webp"
PEOPLE, PHOTOS, SEED = 5, 2, 7
SHOWN = (PROMPTS[1], PROMPTS[3], PROMPTS[4], PROMPTS[6], PROMPTS[8])
TILE, GAP, DIVIDER = 144, 4, 16  # pixels


def main() -> int:
    logging.getLogger(PACK_MODULE).setLevel(logging.ERROR)  # the photos are as small as those of the training
    torch.set_num_threads(1)
    rows = [row_of(subject) for subject in make_subjects(PEOPLE)]
    width = len(rows[0]) * (TILE + GAP) - GAP + DIVIDER - GAP
    sheet = Image.new("RGB", (width, PEOPLE * (TILE + GAP) - GAP), "white")
    for number, row in enumerate(rows):
        for place, pixels in enumerate(row):
            x = place * (TILE + GAP) + (DIVIDER - GAP if place >= PHOTOS else 0)
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, number * (TILE + GAP)))
    sheet.save(PICTURE, quality=85, method=6)
    print(f"wrote {PICTURE}")
    return 0


def row_of(subject: Subject) -> list[Pixels]:
    """Photos of a person, then the pictures."""
    scene = demo_scene()
    identity = scene.identity("uniid", scene.features(subject.references))
    model = scene.applied("uniid", identity, rescaled=True)
    drawn = [
        scene.draw(model, scene.prompt(prompt.text, identity, subject.person.sex), SEED)[0]
        for prompt in SHOWN
    ]
    return [*subject.references[:PHOTOS], *drawn]


if __name__ == "__main__":
    sys.exit(main())
