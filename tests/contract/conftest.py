"""Every method in METHODS, for every UNet family, in both hosts. Runs in the real ComfyUI, as tests/nodes does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract import hosts, samples
from tests.contract.samples import Case

# One thread, the pack imported, and no model left at exit: fixtures of that folder, used here as they are.
from tests.nodes.conftest import _comfyui_and_pack, _no_model_outlives_the_tests  # noqa: F401


@pytest.fixture(params=samples.CASES, ids=str, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """A method and a family."""
    found: Case = request.param
    return found


@pytest.fixture(params=hosts.HOSTS, ids=lambda host: host.__name__, scope="module")
def host(request: pytest.FixtureRequest, case: Case, comfyui: Path) -> Any:
    """Each of the two hosts with the tiny base model of the case's family."""
    return hosts.host_of(request.param, case.family, comfyui)


@pytest.fixture(scope="module")
def cast(host: Any, case: Case) -> hosts.Cast:
    """The case's trained adapter in each of the two hosts."""
    return hosts.cast_of(host, case)


@pytest.fixture(scope="module")
def comfy_cast(case: Case, comfyui: Path) -> hosts.Cast:
    """In ComfyUI, which alone has masks, windows, several identities at once and batches of latents."""
    return hosts.cast_of(hosts.host_of(hosts.ComfyHost, case.family, comfyui), case)


@pytest.fixture(scope="module")
def diffusers_cast(case: Case, comfyui: Path) -> hosts.Cast:
    return hosts.cast_of(hosts.host_of(hosts.DiffusersHost, case.family, comfyui), case)
