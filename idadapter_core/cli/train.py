"""`python -m idadapter_core train --config run.toml`: trains an adapter.

The same configuration runs on one machine or several: `accelerate launch -m idadapter_core train --config run.toml`, or
`torchrun --nproc-per-node 8 -m idadapter_core train --config run.toml`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ..config import add_arguments
from ..training.config import read_config
from .program import Parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 an error, 143 stopped by a signal after a checkpoint, 130 interrupted."""
    parser = Parser(
        prog="python -m idadapter_core train",
        description="Train an IDAdapter or a branch of UniID.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--resume",
        choices=("never", "auto"),
        default="never",
        help="auto: resume from the newest checkpoint in output.folder, if there is one (default: never)",
    )
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume even if settings or data have changed since the checkpoint",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return run(
        lambda: _train(options),
        interrupted="resume from the last checkpoint with --resume auto, if there is one",
    )


def _train(options: argparse.Namespace) -> int:
    config = read_config(options.config, options.set)
    from ..training.loop import train

    return train(config, resume=options.resume, allow_config_change=options.allow_config_change)
