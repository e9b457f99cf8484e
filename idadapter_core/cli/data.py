"""`python -m idadapter_core scan|stats|dedupe|shards|show|convert-index`: prepares photos for training."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.convert import convert, shown
from ..data.dedupe import PEOPLE, dedupe, settings_of
from ..data.index import Index, read_index
from ..data.inventory import describe_inventory
from ..data.jsonl import line_of
from ..data.measure import Limits
from ..data.parquet import SUFFIX
from ..data.ranks import ranks_of
from ..data.rows import STATUSES
from ..data.scan import scan, scan_share
from ..data.shards import INDEX_NAME, write_shards, write_share
from ..data.sources import LAYOUTS, list_photos
from ..data.split import SplitSettings, describe_split
from ..data.stats import bad_photos, describe
from ..errors import ConfigError
from ..extra import progress_bar
from ..faces.detector import PROVIDERS
from .program import Parser, run

LICENCE_NOTE = (
    "Note: insightface's packages of face models (buffalo_l, antelopev2, ...) are for non-commercial research only; "
    "its code is MIT. Datasets have licences of their own."
)
TOO_MANY_BAD = 3
MAX_WORKERS = 16  # each process loads the face models

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 an error, 3 too many bad photos, 130 interrupted, 143 after SIGTERM."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.INFO)
    options = _parser().parse_args(arguments)
    command: Command = options.command
    return run(lambda: command(options), interrupted="give the same command again to go on")


def _scan(options: argparse.Namespace) -> int:
    limits = Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})
    split = SplitSettings(options.test_share, options.seed, options.threshold)
    if not 0 <= options.max_bad_share <= 1:
        raise ConfigError(f"--max-bad-share must be between 0 and 1, got {options.max_bad_share}")
    if not 0 <= options.min_match <= 1:
        raise ConfigError(f"--min-match must be between 0 and 1, got {options.min_match}")
    if options.workers < 0:
        raise ConfigError(f"--workers must be at least 0, got {options.workers}")
    ranks = ranks_of()
    if not ranks.is_first and options.index.exists() and not options.overwrite:
        print(f"{ranks}: {options.index} exists already; nothing is left to do")
        return 0
    _check_output(options)
    source = list_photos(
        options.source,
        options.layout,
        root=options.root,
        captions=options.captions,
        identities=options.identities,
        numbered=options.numbered,
        encoding=options.encoding,
        min_match=options.min_match,
        output=options.index,
    )
    models: dict[str, Any] = {
        "package": options.face_package,
        "recognizer": options.recognizer,
        "provider": options.provider,
        "workers": options.workers,
    }
    if not ranks.is_first:
        with progress_bar(f"photos of {ranks}", "photo") as progress:
            scan_share(source, options.index, ranks=ranks, progress=progress, **models)
        print(f"{ranks}: all its photos are scanned; rank 0 writes the index")
        return 0
    print(f"{len(source.photos)} photos in {source.root} (layout {source.layout})")
    for text in (describe_inventory(source.files.facts()), *source.notes):
        if text:
            print(text)
    print(LICENCE_NOTE)
    with progress_bar("photos", "photo") as progress:
        index = scan(
            source,
            options.index,
            limits=limits,
            split=split,
            world=ranks.world,
            progress=progress,
            **models,
        )
    return _report(index, len(source.notes), options)


def _report(index: Index, shown: int, options: argparse.Namespace) -> int:
    """Print the result of a scan, without the first `shown` notes, which are printed already. Returns the exit code."""
    _print_summary(index)
    for note in index.facts["notes"][shown:]:
        print(note)
    if index.bad_share() > options.max_bad_share:
        print(f"\n{bad_photos(index)}")
        sys.stderr.write(
            f"{index.bad_share():.1%} of the photos cannot be used, more than --max-bad-share {options.max_bad_share:.1%}; see the list "
            f"above. The index is written. Correct the photos or the limits and scan again, or allow a larger share (a training has its "
            "own limit, data.max_bad_share).\n"
        )
        return TOO_MANY_BAD
    return 0


def _stats(options: argparse.Namespace) -> int:
    if options.references < 1:
        raise ConfigError(f"--references must be at least 1, got {options.references}")
    print(describe(read_index(options.index), options.references))
    return 0


def _dedupe(options: argparse.Namespace) -> int:
    _check_output(options)
    index = read_index(options.source)
    changed = {
        name: value
        for name, value in (
            ("share", options.test_share),
            ("seed", options.seed),
            ("threshold", options.threshold),
        )
        if value is not None
    }
    split = dataclasses.replace(settings_of(index.facts), **changed)
    result = dedupe(index, options.index, people=options.people, threshold=split.threshold, split=split)
    found = result.counts()["duplicate"] - index.counts()["duplicate"]
    print(f"{found} photos are duplicates now")
    _print_summary(result)
    return 0


def _shards(options: argparse.Namespace) -> int:
    ranks = ranks_of()
    index = read_index(options.index)
    with progress_bar("photos" if ranks.world == 1 else f"photos of {ranks}", "photo") as progress:
        if not ranks.is_first:
            write_share(index, options.folder, ranks=ranks, photos=options.photos, progress=progress)
            print(f"{ranks}: all its shards are written; rank 0 writes the index")
            return 0
        result = write_shards(
            index, options.folder, photos=options.photos, world=ranks.world, progress=progress
        )
    print(
        f"wrote {len(result.usable())} photos to {options.folder}; train with {options.folder / INDEX_NAME}"
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    _check_output(options)
    _print_summary(convert(options.source, options.index))
    return 0


def _show(options: argparse.Namespace) -> int:
    if min(options.start, options.count or 0) < 0:
        raise ConfigError(f"--start and --count must be at least 0, got {options.start} and {options.count}")
    facts, rows = shown(options.index, options.status)
    lines: Iterator[str] = map(
        line_of, itertools.islice(rows, options.start, options.count and options.start + options.count)
    )
    if options.facts:
        lines = iter([json.dumps(dict(facts), ensure_ascii=False)])
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_summary(index: Index) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in index.counts().items() if count)
    print(f"wrote {index.path}: {len(index.rows)} photos, {counts}")
    if "split" in index.facts:
        print(describe_split(dict(index.facts["split"])))


def _check_output(options: argparse.Namespace) -> None:
    path: Path = options.index
    if path.suffix != SUFFIX:
        raise ConfigError(f"the index must end in {SUFFIX}, got {path.name}")
    if path.exists() and not options.overwrite:
        raise ConfigError(f"{path} exists; choose another name or add --overwrite")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idadapter_core",
        description="Make and edit an index of photos for training.",
        epilog="See docs/datasets.md for the commands for common datasets, and docs/training.md for training.",
    )
    commands = parser.add_subparsers(required=True, metavar="scan|stats|dedupe|shards|show|convert-index")

    _add_scan(commands)
    stats = commands.add_parser("stats", help="describe an index")
    stats.set_defaults(command=_stats)
    stats.add_argument("index", type=Path)
    stats.add_argument(
        "--references", type=int, default=4, help="reference photos in a sample, N (default: %(default)s)"
    )
    _add_dedupe(commands)
    packed = commands.add_parser("shards", help="copy the usable photos into webdataset shards")
    packed.set_defaults(command=_shards)
    packed.add_argument("index", type=Path)
    packed.add_argument("folder", type=Path, help=f"folder for the shards and {INDEX_NAME}")
    packed.add_argument("--photos", type=int, default=1000, help="photos per shard (default: %(default)s)")
    _add_show_and_convert(commands)
    return parser


def _add_scan(commands: Any) -> None:
    new = commands.add_parser("scan", help="measure every photo and write an index")
    new.set_defaults(command=_scan)
    new.add_argument("source", help="folder, table, list or shards (also a pattern like 'a-{000..099}.tar')")
    new.add_argument("index", type=Path, help="the index to write, .parquet")
    new.add_argument(
        "--face-package", type=Path, required=True, help="folder of an insightface package (buffalo_l)"
    )
    new.add_argument(
        "--recognizer",
        type=Path,
        help="file of a torch IResNet, whose embeddings replace those of the package's recogniser",
    )
    new.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="layout of the source (default: detected)"
    )
    new.add_argument(
        "--root",
        type=Path,
        help="folder that names in a table or list are relative to (default: its own folder)",
    )
    new.add_argument("--captions", type=Path, help="folder with a text file for each photo")
    new.add_argument("--identities", type=Path, help='file with lines "image identity"')
    new.add_argument(
        "--numbered", action="store_true", help="line N of the table, from 0, belongs to N.png (FaceID-6M)"
    )
    new.add_argument(
        "--encoding",
        default="",
        help="encoding of captions and tables that are not UTF-8 and have no byte order mark, for example cp1251 (default: such a photo "
        "cannot be used)",
    )
    new.add_argument(
        "--min-match",
        type=float,
        default=0.0,
        help="minimum share of the photos for which --captions, and also --identities, must have an entry (default: %(default)s: the "
        "share is only reported)",
    )
    _add_running(new)
    _add_split_and_limits(new)


def _add_running(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "--provider",
        choices=("auto", *PROVIDERS),
        default="auto",
        help="onnxruntime provider of the face models (default: auto, the fastest available)",
    )
    new.add_argument(
        "--workers",
        type=int,
        default=min(_cores(), MAX_WORKERS),
        help="worker processes; 0: use this process (default: one per core, %(default)s here). The result does not depend on it",
    )
    new.add_argument(
        "--max-bad-share",
        type=float,
        default=0.05,
        help="share of unusable photos above which the exit code is 3 (default: %(default)s)",
    )


def _add_split_and_limits(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "--test-share",
        type=float,
        default=SplitSettings.share,
        help="share of the photos whose people are kept for tests (default: %(default)s)",
    )
    new.add_argument(
        "--seed", type=int, default=SplitSettings.seed, help="seed of the split (default: %(default)s)"
    )
    new.add_argument(
        "--threshold",
        type=float,
        default=SplitSettings.threshold,
        help="cosine above which two people count as one in the split (default: %(default)s)",
    )
    new.add_argument("--overwrite", action="store_true", help="replace an existing index")
    limits = new.add_argument_group("limits of a usable photo")
    for field in dataclasses.fields(Limits):
        kind = int if isinstance(field.default, int) else float
        limits.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=f"{_LIMITS[field.name]} (default: %(default)s)",
        )


def _add_dedupe(commands: Any) -> None:
    single = commands.add_parser("dedupe", help="mark duplicate photos and people in a new index")
    single.set_defaults(command=_dedupe)
    single.add_argument("source", type=Path, metavar="index")
    single.add_argument("index", type=Path, metavar="output", help="the index to write, .parquet")
    which = single.add_mutually_exclusive_group()
    for name, text in zip(
        PEOPLE,
        ("of several people who are one, keep the largest (default)", "give their photos one identity"),
        strict=True,
    ):
        which.add_argument(
            f"--{name}", dest="people", action="store_const", const=name, default=PEOPLE[0], help=text
        )
    single.add_argument(
        "--threshold", type=float, help="cosine above which two people count as one (default: as in the scan)"
    )
    single.add_argument("--test-share", type=float, help="as in scan (default: as in the scan)")
    single.add_argument("--seed", type=int, help="seed of the split (default: as in the scan)")
    single.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _add_show_and_convert(commands: Any) -> None:
    shown = commands.add_parser("show", help="print the rows of an index as JSON, one per line")
    shown.set_defaults(command=_show)
    shown.add_argument("index", type=Path, help="an index; also one of an earlier version, in JSON Lines")
    shown.add_argument("--status", choices=STATUSES, help="print only rows of this status")
    shown.add_argument("--start", type=int, default=0, help="number of rows to skip at the beginning")
    shown.add_argument("--count", type=int, help="maximum number of rows (default: all)")
    shown.add_argument(
        "--facts", action="store_true", help="print the facts about the whole index instead of its rows"
    )

    old = commands.add_parser(
        "convert-index", help="convert an index of an earlier version, in JSON Lines, to Parquet"
    )
    old.set_defaults(command=_convert)
    old.add_argument("source", type=Path, metavar="index")
    old.add_argument("index", type=Path, metavar="output", help="the index to write, .parquet")
    old.add_argument("--overwrite", action="store_true", help="replace an existing output")


_LIMITS = {
    "min_side": "shorter side of the photo, pixels",
    "min_face": "shorter side of the face's box, pixels",
    "min_fraction": "share of the photo that the face's box covers",
    "min_sharpness": "variance of the Laplacian of the aligned crop",
    "max_yaw": "degrees to either side",
    "max_pitch": "degrees up or down",
    "min_cosine": "to the median embedding of the person's photos, else the photo shows somebody else",
}


def _cores() -> int:
    """Cores of this machine per process started on it by torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(cores // max(int(beside), 1), 1) if beside.isdecimal() else cores
