"""The demo world's workflow, which programs convert and run: as the browser does, and with the settings that are measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from idadapter_core.demo_world.claims.subjects import SIZE
from idadapter_core.demo_world.world import CFG, RESCALED, SAMPLER, STEPS
from tests.demo import WORKFLOW
from tests.harness.browser import Browser, find_chromium
from tests.harness.server import ComfyServer
from tests.harness.workflow import api_workflow


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(WORKFLOW.read_text("utf-8"))
    return workflow


@pytest.mark.server
@pytest.mark.browser
@pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
)
def test_it_is_converted_as_the_run_button_does(server: ComfyServer, saved: dict[str, Any]) -> None:
    with Browser(server.url) as browser:
        browser.load_workflow(saved)
        sent = {
            number: {"class_type": node["class_type"], "inputs": node["inputs"]}
            for number, node in browser.graph_to_prompt().items()
        }
    converted = api_workflow(saved)
    assert list(converted) == list(sent)
    for number, node in converted.items():
        assert node == sent[number]


def test_it_draws_as_measurements_do(saved: dict[str, Any]) -> None:
    nodes = list(api_workflow(saved).values())

    def values(kind: str, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(node["inputs"][name] for name in names) for node in nodes if node["class_type"] == kind]

    samplers = values("KSampler", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    assert samplers == [(STEPS, CFG, SAMPLER, "simple", 1.0)] * 4
    assert values("EmptyLatentImage", "width", "height", "batch_size") == [(SIZE, SIZE, 1)]
    scales = ("adapter_early", "adapter_late", "text_early", "text_late")
    assert values("IDAdapterRescale", "mode", *scales) == [
        ("normalized", *(getattr(RESCALED, name) for name in scales))
    ]
