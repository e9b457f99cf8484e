"""Format the results as a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.parts import MACHINE, PARTS

BEGIN, END = "<!-- on_gpu: begin -->", "<!-- on_gpu: end -->"


def markdown(results: Mapping[str, Any]) -> str:
    """Every part with title and table, and the reasons for missing rows."""
    blocks = []
    for part in PARTS:
        if (found := results.get(part.name)) is None:
            continue
        blocks += [f"### {part.title}"]
        if part.about:
            blocks.append(part.about)
        if found["rows"]:
            blocks.append(rows_table(found["rows"]))
        if found["status"] != "ok":
            what = "incomplete" if found["rows"] else "not measured"
            blocks.append(f"This table is {what}: {_first_line(found.get('error', found['status']))}.")
    return "\n\n".join(blocks) + "\n"


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the columns of all rows, in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """Format a value; measurements get three digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value == 0 or abs(value) >= 100:
            return f"{value:.0f}"
        return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")
    return str(value).replace("|", "\\|")


def write_into(page: Path, results: Mapping[str, Any]) -> None:
    """Put the tables between the two markers of a page.

    Raises:
        ValueError: the results are from a trial with tiny sizes, or the page has no markers.
    """
    machine = results.get(MACHINE.name, {}).get("rows", [])
    if not machine or machine[0].get("sizes") != "real":
        raise ValueError("these results are not those of real sizes on a GPU: run it without --tiny")
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no place for the tables, the lines {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n{markdown(results)}\n{END}{tail}", encoding="utf-8")


def _first_line(error: str) -> str:
    return error.strip().splitlines()[0].rstrip(".:")
