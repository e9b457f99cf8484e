"""Schedule of a sampling run: the step of a noise level, and the four scales of normalized rescaling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .errors import InputError

ROUNDING = 2**-8  # relative: a sigma and a level, each rounded to bf16


def step_index(sigma: float, sigmas: Sequence[float]) -> int:
    """Return the step (0-based) of a model call at noise level `sigma`.

    Args:
        sigmas: the run's noise levels, descending, one more than there are steps.

    Calls between two levels (second-order samplers) belong to the step that they started in. If `sigmas` is not descending,
    the last step is returned.
    """
    starts = sigmas[:-1]
    if not starts or sigmas[0] <= sigmas[-1]:
        return max(len(starts) - 1, 0)
    # The tolerance absorbs the rounding of bf16 and fp16 sigmas without reaching the next level of a dense schedule.
    reached = 0
    for number, start in enumerate(starts):
        tolerance = sigma * ROUNDING
        if number:
            tolerance = min(tolerance, (starts[number - 1] - start) / 4)
        reached += start + tolerance >= sigma
    return max(reached - 1, 0)


@dataclass(frozen=True)
class RescaleSchedule:
    """Scales of normalized rescaling, early and late in a run (arXiv 2512.03964; defaults: 5 early steps of 30)."""

    adapter_early: float = 0.8
    adapter_late: float = 1.2
    text_early: float = 0.5
    text_late: float = 1.8
    early_fraction: float = 0.1667  # fraction of the run's steps

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not abs(value) <= sys.float_info.max:  # an int can be too large for a float
                raise InputError(f"{field.name} must be a finite number, got {value}")
        if not 0 <= self.early_fraction <= 1:
            raise InputError(f"early_fraction must be between 0 and 1, got {self.early_fraction}")

    @classmethod
    def parse(cls, text: str) -> RescaleSchedule:
        """Read the numbers as they stand in an adapter's file, separated by commas and in the order of the fields.

        Raises:
            InputError: they are no such numbers.
        """
        try:
            return cls(*(float(number) for number in text.split(",")))
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise InputError(
                f"a rescaling must be up to five numbers separated by commas ({names}), got {text!r}"
            ) from error

    def scaled(self, factor: float) -> RescaleSchedule:
        """Return the schedule with the adapter's scales multiplied by a factor."""
        return replace(
            self, adapter_early=self.adapter_early * factor, adapter_late=self.adapter_late * factor
        )

    def is_early(self, step: int, steps: int) -> bool:
        return step < round(self.early_fraction * steps)

    def adapter_scale(self, step: int, steps: int) -> float:
        """Return s_a of a step."""
        return self.adapter_early if self.is_early(step, steps) else self.adapter_late

    def text_scale(self, step: int, steps: int) -> float:
        """Return s_t of a step."""
        return self.text_early if self.is_early(step, steps) else self.text_late
