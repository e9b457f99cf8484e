"""Common parts of all commands: options, exit codes, and messages after errors and signals."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import IDAdapterError
from ..waiting import TERMINATED, Terminated, end_threads, exit_now, terminable

INTERRUPTED = 130  # exit code after Ctrl+C, as in shells


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations: an abbreviation may become ambiguous when options are added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


def start(main: Callable[[], int]) -> None:
    """Run a program from the command line, and exit with its code.

    Without UTF-8 mode, Python cannot even open files whose names contain characters outside the locale's encoding (ASCII for LC_ALL=C).
    The program is therefore restarted in UTF-8 mode, the default in later Python versions.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and hasattr(sys, "orig_argv"):
        os.environ["PYTHONUTF8"] = "1"  # for its worker processes
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    code = main()
    if not end_threads():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        exit_now(code)
    sys.exit(code)


def run(work: Callable[[], int], *, error: int = 1, interrupted: str = "nothing was written") -> int:
    """Run `work` and return the exit code.

    The code is the result of `work`, `error` after an error message, `INTERRUPTED` after Ctrl+C, or `TERMINATED` after SIGTERM.

    Args:
        interrupted: message after Ctrl+C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Keep the lines of both streams in order in a file, and escape characters outside the locale's encoding.
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
    """Exit with a message if an output file has the wrong extension or already exists."""
    if output.suffix != suffix:
        parser.error(f"the output must end in {suffix}, got {output.name}")
    if output.exists() and not overwrite:
        parser.error(f"{output} exists; choose another name or add --overwrite")
