"""What all programs of this package do with what goes wrong."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import IDAdapterError
from ..waiting import TERMINATED, Terminated, exit_now, is_work_left, terminable

INTERRUPTED = 130  # the exit code after Ctrl+C, as shells have it


class Parser(argparse.ArgumentParser):
    """Options are to be written out: what is short for one today may be short for two tomorrow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


def start(main: Callable[[], int]) -> None:
    """Run a program from the command line, and end with its exit code.

    Python without its UTF-8 mode cannot even open files whose names have letters that the language of the shell lacks (LC_ALL=C has
    ASCII alone). So the program starts once more, in UTF-8 mode, which later versions of Python have by themselves.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and hasattr(sys, "orig_argv"):
        os.environ["PYTHONUTF8"] = "1"  # for its worker processes
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    code = main()
    if (
        is_work_left()
    ):  # Python's own end breaks off threads in the middle of a library's work, which may end in a crash
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        exit_now(code)
    sys.exit(code)


def run(work: Callable[[], int], *, error: int = 1, interrupted: str = "nothing was written") -> int:
    """The exit code of a program: what `work` returns, `error` after a message, `INTERRUPTED` after Ctrl+C, or `TERMINATED` after
    SIGTERM.

    Args:
        interrupted: what to tell who pressed Ctrl+C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In a file, lines of both stay in their order. What the shell's language has no letter for is written as its number.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with terminable():
            return work()
    except IDAdapterError as problem:
        sys.stderr.write(f"{problem}\n")
        return error
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted; {interrupted}\n")
        return INTERRUPTED
    except UnicodeEncodeError as problem:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        sys.stderr.write(
            f"{problem.object!a} cannot be the name of a file in this shell's language; set PYTHONUTF8=1 (or LC_ALL=C.UTF-8)\n"
        )
        return error
    except Terminated:
        sys.stderr.write(f"stopped by SIGTERM; {interrupted}\n")
        return TERMINATED


def require_new(parser: argparse.ArgumentParser, output: Path, suffix: str, overwrite: bool) -> None:
    """End the program with a message where a file to write has another ending, or is there already."""
    if output.suffix != suffix:
        parser.error(f"the output must end in {suffix}, got {output.name}")
    if output.exists() and not overwrite:
        parser.error(f"{output} exists; choose another name or add --overwrite")
