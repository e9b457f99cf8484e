"""What all programs of this package do with what goes wrong."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import IDAdapterError

INTERRUPTED = 130  # the exit code after Ctrl+C, as shells have it


class Parser(argparse.ArgumentParser):
    """Options are to be written out: what is short for one today may be short for two tomorrow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


def run(work: Callable[[], int], *, error: int = 1, interrupted: str = "nothing was written") -> int:
    """The exit code of a program: what `work` returns, `error` after a message, or `INTERRUPTED` after Ctrl+C.

    Args:
        interrupted: what to tell who pressed Ctrl+C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # in a file, its lines and those of stderr stay in their order
    try:
        return work()
    except IDAdapterError as problem:
        sys.stderr.write(f"{problem}\n")
        return error
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted; {interrupted}\n")
        return INTERRUPTED


def require_new(parser: argparse.ArgumentParser, output: Path, suffix: str, overwrite: bool) -> None:
    """End the program with a message where a file to write has another ending, or is there already."""
    if output.suffix != suffix:
        parser.error(f"the output must end in {suffix}, got {output.name}")
    if output.exists() and not overwrite:
        parser.error(f"{output} exists; choose another name or add --overwrite")
