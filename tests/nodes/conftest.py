"""Every test in this folder runs in the real ComfyUI, with the pack imported as ComfyUI imports it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _comfyui_and_pack(pack: ModuleType) -> Iterator[None]:
    """The helpers of `tests/nodes/sampling.py` need both. One thread: the tensors are tiny, waking a second costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
