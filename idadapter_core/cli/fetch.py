"""`python -m idadapter_core fetch`: downloads published models that have a public address, after showing their licence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..doctor import COMFYUI
from ..errors import InputError
from ..fetch import already, fetch, is_there
from ..published import DOWNLOADS, Download
from .program import Parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.list or not options.names:
        sys.stdout.write("".join(_line(download) for download in DOWNLOADS.values()))
        return 0
    for name in options.names:
        if name not in DOWNLOADS:
            parser.error(f"there is no {name!r}; choose from: {', '.join(DOWNLOADS)}")
    return run(
        lambda: _fetch(options), interrupted="what was loaded is kept; the same command goes on from there"
    )


def _fetch(options: argparse.Namespace) -> int:
    models = options.models or (COMFYUI / "models")
    if not models.is_dir():
        raise InputError(f"{models}: no such folder; name the `models` folder of your ComfyUI with --models.")
    mirrors = dict(_mirror(text) for text in options.mirror)
    chosen = [DOWNLOADS[name] for name in dict.fromkeys(options.names)]
    wanted = []
    for download in chosen:
        sys.stdout.write(_line(download))
        if not options.replace and is_there(download, models):
            _say(already(download, models))
            continue
        if not options.yes:
            _ask(download)
        wanted.append(download)
    for download in wanted:
        fetch(download, models, mirrors=mirrors, is_replacing=options.replace, log=_say)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _line(download: Download) -> str:
    size = f"{download.size / 1e6:,.0f} MB" if download.size else "size as the server says"
    return f"{download.name}: {size}, to models/{download.target}\n    from {download.page}; licence: {download.licence}\n"


def _ask(download: Download) -> None:
    """Ask for the licence to be accepted.

    Raises:
        InputError: it is not, or nobody is there to be asked.
    """
    if not sys.stdin.isatty():
        raise InputError(
            f"{download.name}: nobody is here to accept its licence ({download.licence}); add --yes if you accept it."
        )
    sys.stdout.write("Do you accept this licence? Type yes: ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() != "yes":
        raise InputError(f"{download.name} is not loaded: its licence was not accepted.")


def _mirror(text: str) -> tuple[str, str]:
    beginning, divider, mirror = text.partition("=")
    if not divider or not beginning or not mirror:
        raise InputError(
            f"--mirror is BEGINNING=MIRROR, for example https://github.com=https://example.org/github, got {text!r}"
        )
    return beginning, mirror


def _parser() -> Parser:
    parser = Parser(
        prog="python -m idadapter_core fetch",
        description="Download published models that have a public address, after showing their licence. Without names, list them. UniID's "
        "own weights and checkpoints have pages instead: see docs/files.md.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to load: {', '.join(DOWNLOADS)}")
    parser.add_argument("--list", action="store_true", help="list what can be loaded, and load nothing")
    parser.add_argument(
        "--models",
        type=Path,
        help="ComfyUI's `models` folder (default: that of the ComfyUI in whose custom_nodes this pack lies)",
    )
    parser.add_argument("--yes", action="store_true", help="accept the licences without being asked")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="load what is there anew, and replace files of its names once the new ones are whole",
    )
    parser.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="BEGINNING=MIRROR",
        help="load from MIRROR what has an address with this beginning. HF_ENDPOINT does so for https://huggingface.co, and HF_HUB_OFFLINE=1 "
        "forbids every download",
    )
    return parser
