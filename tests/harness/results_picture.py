"""Draws the pictures of results in README and docs: people whom no network was trained on.

    COMFYUI_PATH=... python -m tests.harness.results_picture [NAME ...]

writes docs/images/NAME.webp: `results`, UniID with rescaling; `strengths`, one person from the plain model to strength 2; `photos`, IDAdapter with one
photo and with four. Nothing is chosen by hand: the people are the first of the measurements, with one seed. `thumbnails` draws the cards of the
templates, workflows/NAME.jpg.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from idadapter_core.demo_world.claims.prompts import PROMPTS
from idadapter_core.demo_world.claims.subjects import Pixels, Subject, make_subjects
from tests.harness.comfy import PACK_MODULE, REPOSITORY
from tests.harness.demo_scene import demo_scene

FOLDER = REPOSITORY / "docs" / "images"
SEED = 7
STRENGTHS = (0.0, 0.5, 0.75, 0.9, 1.0, 2.0)
TILE, GAP, DIVIDER, CAPTION = 144, 4, 16, 24  # pixels
CARD = 384  # pixels along a side of a template's card
THUMBNAILS = "thumbnails"

Row = list[list[Pixels]]  # groups of pictures (H, W, 3), with a divider between two


def main(names: Sequence[str]) -> int:
    logging.getLogger(PACK_MODULE).setLevel(logging.ERROR)  # the photos are as small as those of the training
    torch.set_num_threads(1)
    for name in names or (*PICTURES, THUMBNAILS):
        if name == THUMBNAILS:
            draw_thumbnails()
            continue
        rows, captions = PICTURES[name]()
        path = FOLDER / f"{name}.webp"
        sheet_of(rows, captions).save(path, quality=85, method=6)
        print(f"wrote {path}")
    return 0


def results() -> tuple[list[Row], list[str]]:
    """Two photos of each person, then the pictures."""
    rows = [
        [list(subject.references[:2]), _pictures("uniid", subject, (1, 3, 4, 6, 8))]
        for subject in make_subjects(5)
    ]
    return rows, []


def strengths() -> tuple[list[Row], list[str]]:
    """A photo of each person, then one prompt at each strength."""
    scene, rows = demo_scene(), []
    for subject in make_subjects(5)[2:5]:
        identity = scene.identity("uniid", scene.features(subject.references))
        drawn = [
            _drawn(
                scene.at_strength("uniid", identity, strength) if strength else scene.model,
                identity if strength else None,
                subject,
                PROMPTS[1].text,
            )
            for strength in STRENGTHS
        ]
        rows.append([[subject.references[0]], drawn])
    return rows, ["photo", *(f"{strength:g}" for strength in STRENGTHS)]


def photos() -> tuple[list[Row], list[str]]:
    """Four photos of each person, then three prompts with the first photo, and the same with all four."""
    rows = [
        [
            list(subject.references),
            *(_pictures("idadapter", subject, (1, 2, 4), count) for count in (1, len(subject.references))),
        ]
        for subject in make_subjects(5)[2:5]
    ]
    return rows, ["1", "2", "3", "4", "with photo 1", "", "", "with all four", "", ""]


def _pictures(
    method: str, subject: Subject, prompts: Sequence[int], count: int | None = None
) -> list[Pixels]:
    """Draw a person by the first `count` photos (None: all), with the prompts of those numbers."""
    scene = demo_scene()
    identity = scene.identity(method, scene.features(subject.references[:count]))
    model = scene.applied(method, identity, rescaled=method == "uniid")
    return [_drawn(model, identity, subject, PROMPTS[number].text) for number in prompts]


def _drawn(model: object, identity: object, subject: Subject, text: str) -> Pixels:
    scene, sex = demo_scene(), subject.person.sex
    words = text if identity is not None else text.replace("<class word>", sex)
    return scene.draw(model, scene.prompt(words, identity, sex), SEED)[0]


def sheet_of(rows: list[Row], captions: Sequence[str]) -> Image.Image:
    """Put the rows below each other, with captions above the first."""
    groups = [len(group) for group in rows[0]]
    places = [
        number * (TILE + GAP) + group * (DIVIDER - GAP)
        for group, first in enumerate(np.cumsum([0, *groups[:-1]]))
        for number in range(first, first + groups[group])
    ]
    top = CAPTION if captions else 0
    sheet = Image.new("RGB", (places[-1] + TILE, top + len(rows) * (TILE + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for x, caption in zip(places, captions, strict=False):
        draw.text((x + 2, 2), caption, fill="black", font=font)
    for number, row in enumerate(rows):
        for x, pixels in zip(places, (picture for group in row for picture in group), strict=True):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, top + number * (TILE + GAP)))
    return sheet


def draw_thumbnails() -> None:
    """Draw the cards of the templates: four tiles, photos first."""
    people = make_subjects(5)

    @functools.cache
    def drawn(method: str, person: int) -> list[Pixels]:
        return _pictures(method, people[person], (1, 3, 4, 6))

    cards = {
        "one_photo": [people[3].references[1], *drawn("uniid", 3)[:3]],
        "several_photos": [*people[3].references[1:], drawn("uniid", 3)[0]],
        "saved_identity": drawn("uniid", 3),
        "demo_world_app": [people[0].references[0], *drawn("uniid", 0)[:3]],
        "demo_world": [
            people[0].references[0],
            drawn("uniid", 0)[0],
            drawn("idadapter", 0)[0],
            drawn("idadapter", 0)[2],
        ],
        "uniid_sdxl": [people[4].references[0], *drawn("uniid", 4)[:3]],
        "idadapter_sd15": [people[4].references[0], *drawn("idadapter", 4)[:3]],
        "idadapter_sdxl": [people[2].references[0], *drawn("idadapter", 2)[:3]],
        "four_photos_one_person": people[4].references,
    }
    for name, (one, two, three, four) in cards.items():
        pixels = np.concatenate([np.concatenate([one, two], 1), np.concatenate([three, four], 1)], 0)
        card = Image.fromarray(pixels).resize((CARD, CARD), Image.Resampling.LANCZOS)
        card.save(REPOSITORY / "workflows" / f"{name}.jpg", quality=88)


PICTURES: dict[str, Callable[[], tuple[list[Row], list[str]]]] = {
    "results": results,
    "strengths": strengths,
    "photos": photos,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
