"""Run all GPU benchmarks of the documentation on one GPU, in at most 8 minutes, with random weights of real sizes.

    python -m benchmarks.on_gpu output/on_gpu.json              # everything
    python -m benchmarks.on_gpu output/on_gpu.json --only steps waits
    python -m benchmarks.on_gpu --table output/on_gpu.json      # writes the tables of docs/benchmarks.md
    python -m benchmarks.on_gpu trial.json --tiny               # tiny sizes, also on a CPU: tests the benchmarks themselves

Each part runs in a separate process with its own time limit, so a failure does not affect the others. COMFYUI_PATH is the folder of
ComfyUI; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.parts import PARTS, REAL, TINY, Part, named
from benchmarks.on_gpu.processes import measure, run_all
from benchmarks.on_gpu.table import write_into

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BUDGET = 470.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="the JSON file to write")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help=", ".join(part.name for part in PARTS)
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; without a GPU on the CPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--table", type=Path, metavar="JSON", help="write the tables of a finished run")
    parser.add_argument("--page", type=Path, default=PAGE, help="where --table writes them")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # internal: runs one part in its own process
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        parts = named(options.only)
        if options.part:
            return _one(next(part for part in PARTS if part.name == options.part), options)
        if options.table:
            write_into(options.page, json.loads(options.table.read_text(encoding="utf-8")))
            print(f"the tables are in {options.page}")
            return 0
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.output is None:
        parser.error("name the JSON file to write, or --table with one that was written")
    results = run_all(
        parts, lambda part, lines: _command(part, lines, options.tiny), options.output, options.budget
    )
    print(f"the results are in {options.output}")
    return int(any(found["status"] != "ok" for found in results.values()))


def _command(part: Part, lines: Path, tiny: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--part", part.name, "--lines", str(lines)]
    return [*command, "--tiny"] if tiny else command


def _one(part: Part, options: argparse.Namespace) -> int:
    from benchmarks.on_gpu.machine import start

    start(part.dynamic)
    if options.tiny:
        import torch

        torch.set_num_threads(1)  # waking a second thread takes longer than computing tiny tensors
    return measure(part, TINY if options.tiny else REAL, options.lines)


if __name__ == "__main__":
    sys.exit(main())
