"""Which step a model call belongs to, and which scales act at that step."""

from __future__ import annotations

import math

import pytest
import torch

from idadapter_core.errors import InputError
from idadapter_core.schedule import RescaleSchedule, step_index


def karras(steps: int, high: float = 14.6, low: float = 0.03) -> list[float]:
    """A run's noise levels (arXiv 2206.00364), ending with 0."""
    ramp = [i / max(steps - 1, 1) for i in range(steps)]
    return [(high ** (1 / 7) + x * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for x in ramp] + [0.0]


@pytest.mark.parametrize("steps", [1, 2, 30, 100])
def test_each_level_starts_its_step(steps: int) -> None:
    sigmas = karras(steps)
    assert [step_index(sigma, sigmas) for sigma in sigmas[:-1]] == list(range(steps))


def test_calls_between_two_levels_belong_to_the_step_they_started_in() -> None:
    sigmas = karras(30)
    for step, (start, end) in enumerate(zip(sigmas, sigmas[1:-1], strict=False)):
        for inside in (0.9 * start + 0.1 * end, math.sqrt(start * end), 0.1 * start + 0.9 * end):
            assert step_index(inside, sigmas) == step


def test_levels_outside_the_run() -> None:
    sigmas = karras(10)
    assert step_index(1000.0, sigmas) == 0
    assert step_index(sigmas[0] * 1.2, sigmas) == 0
    assert step_index(0.001, sigmas) == 9
    assert step_index(0.0, sigmas) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [4, 20, 30, 50])
def test_rounding_moves_no_call_to_another_step(dtype: torch.dtype, steps: int) -> None:
    sigmas = karras(steps)
    rounded = torch.tensor(sigmas).to(dtype).tolist()
    assert [step_index(sigma, sigmas) for sigma in rounded[:-1]] == list(range(steps))
    assert [step_index(sigma, rounded) for sigma in sigmas[:-1]] == list(range(steps))


def test_a_run_that_starts_late_counts_from_its_own_start() -> None:
    sigmas = karras(30)[20:]
    assert step_index(sigmas[0], sigmas) == 0
    assert step_index(sigmas[3], sigmas) == 3


@pytest.mark.parametrize(
    ("sigmas", "step"), [([0.0, 1.0, 2.0], 1), ([3.0, 3.0, 3.0], 1), ([5.0], 0), ([], 0)]
)
def test_no_descending_schedule_means_the_last_step(sigmas: list[float], step: int) -> None:
    assert step_index(1.0, sigmas) == step


def test_published_schedule() -> None:
    schedule = RescaleSchedule()
    early = [schedule.is_early(step, 30) for step in range(30)]
    assert early == [True] * 5 + [False] * 25
    assert (schedule.adapter_scale(4, 30), schedule.text_scale(4, 30)) == (0.8, 0.5)
    assert (schedule.adapter_scale(5, 30), schedule.text_scale(5, 30)) == (1.2, 1.8)


@pytest.mark.parametrize(
    ("fraction", "steps", "early"), [(0.0, 30, 0), (1.0, 30, 30), (0.5, 1, 0), (0.1667, 6, 1)]
)
def test_early_fraction_is_a_share_of_the_steps(fraction: float, steps: int, early: int) -> None:
    schedule = RescaleSchedule(early_fraction=fraction)
    assert sum(schedule.is_early(step, steps) for step in range(steps)) == early


@pytest.mark.parametrize("fraction", [-0.01, 1.01])
def test_early_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(InputError, match=rf"early_fraction must be between 0 and 1, got {fraction}"):
        RescaleSchedule(early_fraction=fraction)


@pytest.mark.parametrize(
    "name", ["adapter_early", "adapter_late", "text_early", "text_late", "early_fraction"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_must_be_finite(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be a finite number, got {value}"):
        RescaleSchedule(**{name: value})
