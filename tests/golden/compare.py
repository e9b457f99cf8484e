"""One measure for every golden value: the largest absolute difference, printed for `pytest -rP`."""

from __future__ import annotations

from torch import Tensor

TOLERANCE = 2e-5


def assert_published(name: str, found: Tensor, expected: Tensor) -> None:
    """Fail unless `found` agrees with the published code's `expected` to `TOLERANCE` everywhere."""
    assert found.shape == expected.shape
    difference = float((found.detach() - expected).abs().max())
    print(f"{name}: largest difference {difference:.2e}, of values up to {float(expected.abs().max()):.2f}")
    assert difference <= TOLERANCE
