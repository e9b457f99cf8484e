"""Text to image with the tiny checkpoints, through the stock nodes of the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.harness.browser import Browser, find_chromium
from tests.harness.server import ComfyServer
from tests.harness.workflow import Graph, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES

pytestmark = pytest.mark.server


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


@pytest.mark.parametrize("kind", CHECKPOINT_NAMES)
def test_text_to_image(server: ComfyServer, kind: str) -> None:
    graph = Graph()
    nodes = add_text_to_image(graph, CHECKPOINT_NAMES[kind])
    result = server.run(graph.workflow).check()
    (image,) = result.images
    assert image.format == "PNG"
    assert image.size == (64, 64)
    # Neither black, as a NaN would leave it, nor clipped flat.
    assert pixels(image).std() > 10
    assert nodes["sampler"].id in result.executed_nodes
    assert set(result.executed_nodes) | set(result.cached_nodes) == set(graph.workflow)


@pytest.mark.parametrize("kind", CHECKPOINT_NAMES)
def test_the_prompt_shows_in_the_picture(server: ComfyServer, kind: str) -> None:
    images = []
    for prompt in ("a photo of a woman", "a photo of a man"):
        graph = Graph()
        add_text_to_image(graph, CHECKPOINT_NAMES[kind], prompt=prompt)
        images.append(pixels(server.run(graph.workflow).check().images[0]))
    assert np.abs(images[0] - images[1]).mean() > 0.5


def test_an_unchanged_graph_comes_from_the_cache(server: ComfyServer) -> None:
    graph = Graph()
    nodes = add_text_to_image(graph, CHECKPOINT_NAMES["sdxl"], seed=2)
    first = server.run(graph.workflow).check()
    again = server.run(graph.workflow).check()
    assert nodes["sampler"].id in first.executed_nodes
    assert again.executed_nodes == []
    assert nodes["sampler"].id in again.cached_nodes

    graph.workflow[nodes["sampler"].id]["inputs"]["seed"] = 3
    changed = server.run(graph.workflow).check()
    assert set(changed.executed_nodes) == {nodes[role].id for role in ("sampler", "decoder", "save")}


def test_a_run_can_be_interrupted(server: ComfyServer) -> None:
    graph = Graph()
    nodes = add_text_to_image(graph, CHECKPOINT_NAMES["sdxl"], steps=5000, seed=4)

    def interrupt(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == nodes["sampler"].id and data["value"] == 1:
            server.interrupt()

    result = server.run(graph.workflow, on_message=interrupt)
    assert result.interrupted
    assert result.error is None
    assert result.images == []
    assert server.queue() == {"queue_running": [], "queue_pending": []}


@pytest.mark.browser
@pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
)
def test_the_frontend_opens_a_graph_and_sends_it_back(server: ComfyServer, tmp_path: Path) -> None:
    graph = Graph()
    add_text_to_image(graph, CHECKPOINT_NAMES["sdxl"], seed=5)
    with Browser(server.url) as browser:
        browser.load_prompt(graph.workflow)
        assert sorted(node.type for node in browser.nodes()) == sorted(
            node["class_type"] for node in graph.workflow.values()
        )
        assert browser.bad_nodes() == []
        assert browser.toasts() == browser.dialogs() == browser.console_errors == []
        assert browser.error_overlay() == ""
        sent = browser.graph_to_prompt()
        browser.screenshot(tmp_path / "graph.png")

        workflow = browser.serialize()
        workflow["nodes"][0]["type"] = "NoSuchNode"
        browser.load_workflow(workflow)
        assert [node.type for node in browser.bad_nodes()] == ["NoSuchNode"]
        assert "NoSuchNode" in browser.error_overlay()

    with Image.open(tmp_path / "graph.png") as picture:
        assert picture.size == browser.size
    assert {node: entry["inputs"] for node, entry in sent.items()} == {
        node: entry["inputs"] for node, entry in graph.workflow.items()
    }
    assert server.run(sent).check().images[0].size == (64, 64)
