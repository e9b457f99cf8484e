"""`python -m idadapter_core cache build|verify --config run.toml`: computes the latents and features of a run's photos in advance.

`build` resumes an interrupted build, and shares its work among the processes of `torchrun` or `accelerate launch`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..config import add_arguments
from ..errors import ConfigError
from ..extra import progress_bar, require
from ..training.config import read_config
from .program import Parser, run

TOLERANCE = 0.02  # relative, between devices and after fp16


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 an error or differing entries, 130 interrupted, 143 after SIGTERM."""
    parser = Parser(
        prog="python -m idadapter_core cache",
        description="Build or verify the cache of a training run.",
    )
    parser.add_argument(
        "command", choices=("build", "verify"), help="compute missing entries, or recompute some and compare"
    )
    add_arguments(parser)
    parser.add_argument(
        "--count", type=int, default=64, help="entries of each kind that verify recomputes (default: 64)"
    )
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    messages = {
        "build": "computed entries are kept; the same command computes the rest",
        "verify": "nothing was changed",
    }
    return run(lambda: _run(options), interrupted=messages[options.command])


def _run(options: argparse.Namespace) -> int:
    from ..training.cache import build, verify
    from ..training.parts import load_parts, require_files
    from ..training.ranks import has_accelerator
    from ..training.watch import start_watch

    config = read_config(options.config, options.set)
    if not config.data.cache:
        raise ConfigError("data.cache is empty; name the folder of the cache there")
    require_files(config)
    watch = start_watch(set())
    if watch is not None:  # each process computes its share independently
        watch.close(is_end_agreed=True)
    # Without `cpu`, accelerate assumes a single process on a machine without accelerators.
    state = require("accelerate").PartialState(cpu=not has_accelerator())
    parts = load_parts(config, state.device)
    if options.command == "verify":
        differences = verify(parts, config, options.count, state.device)
        for name, difference in differences.items():
            sys.stdout.write(f"{name}: largest relative difference {difference:.2g}\n")
        return int(max(differences.values()) > TOLERANCE)
    written = build(
        parts,
        config,
        device=state.device,
        rank=state.process_index,
        world=state.num_processes,
        progress=lambda name: progress_bar(name, "entry"),
    )
    who = f"process {state.process_index + 1} of {state.num_processes}, " if state.num_processes > 1 else ""
    for name, count in written.items():
        result = f"{count} entries computed" if count else "all entries exist already"
        sys.stdout.write(f"{who}{name}: {result}\n")
    return 0
