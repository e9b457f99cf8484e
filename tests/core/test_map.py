"""docs/map.md names every file as it is."""

from __future__ import annotations

from tests.harness import file_map


def test_the_map_is_that_of_the_files() -> None:
    assert file_map.TARGET.read_text(encoding="utf-8") == file_map.text(), (
        "run `python -m tests.harness.file_map` to write it anew"
    )


def test_every_file_says_what_it_is_for() -> None:
    lines = [line for line in file_map.text().splitlines() if line.startswith("- `")]
    assert len(lines) > 150
    for line in lines:
        assert len(line.partition("`: ")[2]) > 20, line
