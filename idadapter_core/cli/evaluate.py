"""`python -m idadapter_core evaluate --config eval.toml`: measures adapters on people, prompts and seeds."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import add_arguments
from .program import Parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 a requirement is not met, 2 an error, 130 interrupted, 143 after SIGTERM."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return run(
        lambda: _evaluate(options),
        error=2,
        interrupted="pictures are kept; the same command draws and measures the rest",
    )


def _evaluate(options: argparse.Namespace) -> int:
    from ..evaluation.config import read_evaluation, require_files, require_sound
    from ..evaluation.metrics import read_requirement
    from ..evaluation.presets import with_preset

    overrides = [*options.set, *([f"preset.name={options.preset}"] if options.preset else [])]
    config = with_preset(read_evaluation(options.config, overrides))
    require_sound(config)
    # Report all errors in the request before any model is loaded.
    requirements = [read_requirement(text, config) for text in options.require]
    require_files(config)

    from ..data.index import read_index
    from ..evaluation.generate import PipelineGenerator
    from ..evaluation.observe import Observer
    from ..evaluation.run import evaluate

    index = read_index(Path(config.data.index))
    observer = Observer(config)
    summary, generated = evaluate(config, index, PipelineGenerator(config, index), observer)
    pictures = sum(len(row.pictures) for row in summary.rows)
    sys.stdout.write(
        f"{pictures} pictures measured, {generated} of them generated now (pasted photos need none, people of one noun share "
        "those of the base model, and pictures drawn before are kept).\n"
    )
    for row in summary.rows:
        found = row.metrics["id_sim"]
        shown = "n/a" if found is None else f"{found.mean:.3f}"
        sys.stdout.write(f"{row.title}: IDAdapter ID-Sim {shown}, {row.misses} misses\n")
    sys.stdout.write(f"{Path(config.output.folder) / 'report.html'}\n")
    failures = [line for requirement in requirements for line in requirement.failures(summary.adapters())]
    for line in failures:
        sys.stderr.write(f"{line}\n")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idadapter_core evaluate",
        description="Measure identity adapters: preservation of identity, prompt adherence, variety of the pictures.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="add the rows of a paper's ablation: idadapter-table2 or uniid-ablation",
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="'METRIC>=VALUE'",
        help="exit with 1 unless every adapter meets it at every scale; 'RUN/METRIC>=VALUE' for one run; can be repeated",
    )
    return parser
