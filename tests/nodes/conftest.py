"""Every test in this folder runs in the real ComfyUI, with the pack imported as ComfyUI imports it."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="session", autouse=True)
def _the_pack(pack: ModuleType) -> None:
    """The helpers of `tests/nodes/sampling.py` import the pack."""
