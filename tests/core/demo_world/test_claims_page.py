"""The page of measured claims says what the record says."""

from __future__ import annotations

from tests.harness import claims_page


def test_the_tables_are_those_of_the_record() -> None:
    assert claims_page.PAGE.read_text("utf-8") == claims_page.text(), (
        "run `python -m tests.harness.claims_page` to write them anew"
    )
