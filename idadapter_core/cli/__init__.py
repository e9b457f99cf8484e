"""The commands of `python -m idadapter_core`. Each module has a `main(arguments)` that returns the exit code."""

from __future__ import annotations

import importlib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass

from .program import Parser


@dataclass(frozen=True)
class Command:
    """One command: the module with its `main`, and a line of help."""

    module: str
    summary: str
    is_named: bool = False  # its `main` serves several commands and needs the name


COMMANDS = {
    "scan": Command("data", "measure every photo and write an index", is_named=True),
    "stats": Command("data", "describe an index", is_named=True),
    "dedupe": Command("data", "mark duplicate photos and people", is_named=True),
    "shards": Command("data", "copy the usable photos into webdataset shards", is_named=True),
    "show": Command("data", "print the rows of an index as JSON, one per line", is_named=True),
    "convert-index": Command("data", "convert an index of an earlier version to Parquet", is_named=True),
    "cache": Command("cache", "compute or verify the latents and features of a run's photos"),
    "train": Command("train", "train an adapter"),
    "export": Command("export", "write a trained adapter as a file for Load ID Adapter"),
    "evaluate": Command("evaluate", "measure adapters: identity, prompt adherence, variety"),
    "convert": Command("convert", "describe or convert a checkpoint; write an untrained IDAdapter"),
    "fetch": Command(
        "fetch", "download published models that have a public address, after showing their licence"
    ),
    "doctor": Command("doctor", "say which programs and model files are here, and what is missing"),
    "demo-world": Command("demo_world", "draw synthetic people; build the networks of their world"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the command's exit code, 0 after listing the commands, 2 for an unknown command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not given or given[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    parser.parse_args(given[:1])  # exits if the command is unknown
    name, rest = given[0], given[1:]
    command = COMMANDS[name]
    module = importlib.import_module(f".{command.module}", __package__)
    code: int = module.main([name, *rest] if command.is_named else rest)
    return code


def _parser() -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = Parser(
        prog="python -m idadapter_core",
        usage="%(prog)s COMMAND ...",
        description="commands:\n" + "\n".join(lines),
        epilog="COMMAND --help lists the options of a command. See docs/training.md, and docs/demo_world.md for demo-world.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    return parser
