"""Writes the tables of docs/claims.md from docs/claims/claims.json: run `python -m tests.harness.claims_page`.

What was read from them stands above them, and is written by hand.
"""

from __future__ import annotations

import json
import sys

from idadapter_core.demo_world.claims.cases import all_cases
from idadapter_core.demo_world.claims.record import FILE, Record
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
    plan = json.loads((FOLDER / FILE).read_text("utf-8"))["plan"]
    by_hand = PAGE.read_text("utf-8").partition(MARK)[0]
    prompts = "".join(f"{number}. {prompt}\n" for number, prompt in enumerate(plan["prompts"], 1))
    sheets = "".join(
        f"- [{case.title}](claims/grids/{case.name}.jpg)\n"
        for case in all_cases()
        if (FOLDER / "grids" / f"{case.name}.jpg").is_file()
    )
    return f"{by_hand}{MARK}\n{tables(Record.open(FOLDER, plan), ASSETS)}\n{SHEETS}\n{prompts}\n{sheets}"


def main() -> int:
    PAGE.write_text(text(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
