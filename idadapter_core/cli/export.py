"""`python -m idadapter_core export RUN OUTPUT.safetensors`: writes the adapter of a run or checkpoint as a file for Load ID Adapter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..adapter import load_adapter, save_adapter
from ..errors import ConfigError
from ..files import DTYPES
from ..training.checkpoints import ADAPTER, EMA, checkpoints
from .program import Parser, require_new, run

WEIGHTS = ("auto", "ema", "trained")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = Parser(
        prog="python -m idadapter_core export",
        description="Write a trained adapter as one file for Load ID Adapter (models/idadapter).",
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="trained: weights after the last step; ema: their moving average; auto: ema if there is one (default)",
    )
    parser.add_argument(
        "--text-branch", type=Path, help="UniID: run of the text branch; one file then holds both branches"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="keep", help="precision of the weights (default: fp32, as trained)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    options = parser.parse_args(arguments)
    require_new(parser, options.output, ".safetensors", options.overwrite)
    return run(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    files = [
        adapter_file(folder, options.weights, options.step if folder == options.run else None)
        for folder in (options.run, options.text_branch)
        if folder is not None
    ]
    adapter = load_adapter(files[0], files[1] if len(files) > 1 else None)
    save_adapter(adapter, options.output, DTYPES[options.dtype])
    size = options.output.stat().st_size
    sys.stdout.write(
        f"{adapter.info}\nfrom {', '.join(map(str, files))}\nwrote {options.output} ({size:,} bytes)\n"
    )
    return 0


def adapter_file(run: Path, weights: str = "auto", step: int | None = None) -> Path:
    """Find the adapter file in a run or a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    folder = run
    if (folder / ADAPTER).is_file():
        if step is not None:
            raise ConfigError(
                f"{folder}: is one checkpoint; leave --step out, or name the folder of the run."
            )
    else:
        if not run.is_dir():
            raise ConfigError(
                f"{run}: no such folder. Name the folder of a run (output.folder) or of a checkpoint."
            )
        found = checkpoints(run)
        chosen = [c for c in found if step is None or c.step == step]
        if not chosen:
            steps = ", ".join(str(c.step) for c in found) or "none"
            raise ConfigError(
                f"{run}: no checkpoint{'' if step is None else f' of step {step}'} (there are: {steps}). Name the folder of a run "
                "(output.folder) or of a checkpoint."
            )
        folder = chosen[-1].path
    averaged = folder / EMA
    if weights == "ema" and not averaged.is_file():
        raise ConfigError(
            f"{folder}: holds no averaged weights (train.ema_decay was 0); use --weights trained"
        )
    return averaged if weights != "trained" and averaged.is_file() else folder / ADAPTER
