"""Run each part in a separate process with a time limit: a crash, out-of-memory or hang affects that part only.

A process writes one line of JSON per row as soon as it is measured. Results so far are on disk after every part.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.parts import MACHINE, Part, Report, Sizes

_LAST_LINES = 12  # of the output of a failed process
Command = Callable[[Part, Path], Sequence[str]]
"""Makes the command line that measures a part and writes its lines to a file."""


def run_all(
    parts: Sequence[Part], command: Command, output: Path, budget: float, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure parts one after the other. The results are also written to `output`, a JSON file.

    Args:
        budget: seconds for all parts. A part gets its own limit or the rest, whichever is shorter.
    """
    began = time.monotonic()
    results: dict[str, Any] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = budget - (time.monotonic() - began)
        if left <= 1:
            results[part.name] = {
                "status": "not run",
                "error": f"the {budget:.0f} s for all parts were used up",
                "rows": [],
            }
        else:
            results[part.name] = run_part(part, command, min(part.limit, left))
        found = results[part.name]
        say(
            f"{part.name}: {found['status']}, {len(found['rows'])} rows, {found.get('seconds', 0):.0f} s {found.get('error', '')}".rstrip()
        )
        _write(output, results)
        if part is MACHINE and found["status"] != "ok":
            break
    return results


def run_part(part: Part, command: Command, limit: float) -> dict[str, Any]:
    """Run a part. Returns status ("ok", "failed" or "timeout"), seconds, rows, and the reason for a failure."""
    with tempfile.TemporaryDirectory() as name:
        lines, log = Path(name) / "lines.jsonl", Path(name) / "log"
        began = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command(part, lines),
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that processes started by it end with it
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        found = _read(lines)
        found["seconds"] = round(time.monotonic() - began, 1)
        if code is None:
            found |= {"status": "timeout", "error": f"it took longer than its {limit:.0f} s"}
        elif found["status"] != "ok" and "error" not in found:
            end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            found["error"] = f"its process ended with code {code}: " + "\n".join(end)
    return found


def measure(part: Part, sizes: Sizes, lines: Path) -> int:
    """Entry point of a part's process: measure, write the rows, then the status. Returns the exit code."""
    with lines.open("a", encoding="utf-8") as stream:

        def write(entry: dict[str, Any]) -> None:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()

        report: Report = lambda row: write({"row": row})  # noqa: E731 - names the type
        try:
            part.run(sizes, report)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            write({"error": f"{type(error).__name__}: {error}"})
            return 1
        write({"done": True})
    return 0


def _read(lines: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"status": "failed", "rows": []}
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # a truncated line
            entry = json.loads(line)
            if "row" in entry:
                found["rows"].append(entry["row"])
            elif "error" in entry:
                found["error"] = entry["error"]
            else:
                found["status"] = "ok"
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _write(path: Path, results: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
