"""The calculated costs of a training: the page shows what the command prints, and the arithmetic answers to its assumptions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import training_cost as cost
from tests.harness.shim import run_shim

PAGE = Path(__file__).resolve().parents[3] / "docs" / "training_costs.md"
BY_NAME = {recipe.name: recipe for recipe in cost.RECIPES}
CHEAP = BY_NAME["UniID, text, SD1.5 512 px"]
SHOWN = (CHEAP, BY_NAME["IDAdapter, SD1.5 512 px"])


@pytest.fixture(scope="module", autouse=True)
def _diffusers_imports() -> None:
    run_shim()


def test_the_page_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For two runs of its eight: counting the operations of all takes a minute."""
    monkeypatch.setattr(cost, "RECIPES", SHOWN)
    monkeypatch.setattr(sys, "argv", ["training_cost"])
    cost.main()
    page = PAGE.read_text(encoding="utf-8").splitlines()
    printed = [line for line in capsys.readouterr().out.splitlines() if line and "---" not in line]
    assert len(printed) == 3 * (1 + len(SHOWN))
    assert [line for line in printed if line not in page] == []
    assert sum(line.startswith("| ") and "UniID, adapter, SDXL 512 px |" in line for line in page) == 3


def test_half_the_speed_takes_twice_as_long() -> None:
    fast, slow = (cost.hours(CHEAP, utilisation) for utilisation in (0.4, 0.2))
    assert float(slow[3]) == pytest.approx(2 * float(fast[3]), abs=0.1)
    assert slow[0] == fast[0]


def test_a_slow_network_costs_more_than_a_fast_one() -> None:
    inside, slow, fast = (int(cell.split(" %")[0]) for cell in cost.exchange(CHEAP, 0.4)[3:])
    assert slow < fast < inside < 100
