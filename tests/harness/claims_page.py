"""Writes the tables of docs/claims.md from docs/claims/claims.json: run `python -m tests.harness.claims_page`.

What was read from them stands above them, and is written by hand.
"""

from __future__ import annotations

import sys

from idadapter_core.demo_world.claims.cases import ABLATIONS, SHORT as MAIN
from idadapter_core.demo_world.claims.draw import Plan
from idadapter_core.demo_world.claims.prompts import PROMPTS
from idadapter_core.demo_world.claims.record import FILE, Record, read_record
from idadapter_core.demo_world.claims.run import tables
from idadapter_core.demo_world.shipped import ASSETS
from tests.harness.comfy import REPOSITORY

FOLDER = REPOSITORY / "docs" / "claims"
PAGE = REPOSITORY / "docs" / "claims.md"
SHEETS = """## Sheets

The first eight people, each in a row: a reference photo, then the pictures of the first seed with these prompts.
"""
MARK = "<!-- Below: written by python -m tests.harness.claims_page -->\n"


def text() -> str:
    """The content of the page."""
    record = measured()
    by_hand, mark, _ = PAGE.read_text("utf-8").partition(MARK)
    if not mark:
        raise ValueError(
            f"{PAGE} lacks the line that divides what is written by hand from the tables: {MARK}"
        )
    prompts = "".join(f"{number}. `{prompt}`\n" for number, prompt in enumerate(record.plan["prompts"], 1))
    sheets = "".join(
        f"- [{case.title}](claims/grids/{case.name}.webp)\n"
        for case in (*MAIN, *ABLATIONS)
        if case.name in record.cases and (FOLDER / "grids" / f"{case.name}.webp").is_file()
    )
    return f"{by_hand}{MARK}\n{tables(record, ASSETS)}\n{SHEETS}\n{prompts}\n{sheets}"


def measured() -> Record:
    """The record, if it is of this form, these prompts and this way to draw."""
    plan, _ = read_record(FOLDER / FILE)
    prompts = PROMPTS[: len(plan["prompts"])]
    return Record.open(FOLDER, Plan(plan["people"], plan["seeds"], prompts, plan["dtype"]).facts)


def main() -> int:
    PAGE.write_text(text(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
