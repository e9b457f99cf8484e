"""Every test in this folder runs in the real ComfyUI, with the pack imported as ComfyUI imports it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _no_model_outlives_the_tests() -> Iterator[None]:
    """ComfyUI's models complain when the interpreter takes its modules away before them."""
    yield
    for cached in [thing for thing in gc.get_objects() if type(thing) is type(functools.cache(id))]:
        if str(getattr(cached, "__module__", "")).startswith("tests."):
            cached.cache_clear()
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture
def warnings_on(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """What the pack has warned of so far on nodes of one display name."""
    caplog.set_level("WARNING")

    def on(title: str) -> list[str]:
        start = f"{title}: "
        return [text.removeprefix(start) for text in caplog.messages if text.startswith(start)]

    return on
