"""One dial between more of the prompt and more of the person."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import InputError

STRONGEST = 2.0


@dataclass(frozen=True)
class Dial:
    """What a strength means: points (strength, factor) with straight lines between them.

    The factor multiplies the scales or the weight that a method is usually used with. Strength 0 has factor 0, which is the model alone, and
    strength 1 has factor 1.
    """

    points: tuple[tuple[float, float], ...]

    def factor(self, strength: float) -> float:
        """Return the factor of a strength.

        Raises:
            InputError: the strength is outside 0..2, or not finite.
        """
        if not (math.isfinite(strength) and 0 <= strength <= STRONGEST):
            raise InputError(f"strength must be between 0 and {STRONGEST:g}, got {strength}")
        for (low, at_low), (high, at_high) in zip(self.points, self.points[1:], strict=False):
            if strength <= high:
                return at_low + (at_high - at_low) * (strength - low) / (high - low)
        return self.points[-1][1]


IN_PROPORTION = Dial(((0.0, 0.0), (STRONGEST, STRONGEST)))
