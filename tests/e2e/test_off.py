"""Off means off: whichever node is bypassed, the graph runs, and the picture is that of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from idadapter_core.demo_world.world import RESCALED
from tests.e2e.test_face_identity import TEXT, base, demo_world, drawn, face_identity
from tests.harness.browser import Browser, find_chromium
from tests.harness.server import ComfyServer
from tests.harness.workflow import Graph, Node

pytestmark = pytest.mark.server
BYPASSED = 4


def chain(method: str, **given: Any) -> tuple[Graph, dict[str, Node]]:
    graph = Graph()
    world, person = demo_world(graph, method, photos=2)
    nodes: dict[str, Node] = {"world": world}
    nodes["faces"] = graph.add(
        "IDAdapterExtractFaces", image=person, analyzer=world[4], clip_vision=world[3], select="largest", index=0, on_missing="error"
    )  # fmt: skip
    nodes["mix"] = graph.add(
        "IDAdapterMixFeatures", adapter=world[5], faces=nodes["faces"], mode="auto", references=0, weights="", outliers="reject"
    )  # fmt: skip
    nodes["prompt"] = graph.add(
        "IDAdapterPrompt", clip=world[1], identity=nodes["mix"], text=TEXT, class_word="man", token_weight=1.0
    )
    negative = graph.add("CLIPTextEncode", clip=world[1], text="")
    nodes["apply"] = graph.add(
        "IDAdapterApply", model=world[0], adapter=world[5], identity=nodes["mix"], weight=1.0, start_percent=0.0, end_percent=1.0
    )  # fmt: skip
    nodes["rescale"] = graph.add(
        "IDAdapterRescale", model=nodes["apply"], mode=given.get("mode", "normalized"), scope="ID adapters", gated=False,
        **vars(RESCALED),
    )  # fmt: skip
    nodes["save"] = drawn(graph, world, nodes["rescale"], nodes["prompt"], negative)
    return graph, nodes


def picture(server: ComfyServer, graph: Graph, nodes: dict[str, Node]) -> np.ndarray:
    (found,) = server.run(graph.workflow).check().images_by_node[nodes["save"].id]
    return np.asarray(found)


@pytest.fixture(scope="module")
def plain(server: ComfyServer) -> np.ndarray:
    return base(server, TEXT.replace("<class word>", "man"))


@pytest.mark.parametrize("method", ["UniID", "IDAdapter", "IP-Adapter FaceID"])
@pytest.mark.parametrize("off", ["apply", "mix", "prompt"])
def test_without_a_part_the_picture_is_that_of_the_model(
    server: ComfyServer, plain: np.ndarray, method: str, off: str
) -> None:
    graph, nodes = chain(method)
    graph.workflow[nodes[off].id]["inputs"]["off"] = True
    assert np.array_equal(picture(server, graph, nodes), plain)
    del graph.workflow[nodes[off].id]["inputs"]["off"]
    assert not np.array_equal(picture(server, graph, nodes), plain), "it is on again"


def test_rescaling_that_is_off_is_none(server: ComfyServer) -> None:
    graph, nodes = chain("UniID")
    graph.workflow[nodes["rescale"].id]["inputs"]["off"] = True
    naive, again = chain("UniID", mode="off")
    assert np.array_equal(picture(server, graph, nodes), picture(server, naive, again))


def test_an_adapter_that_was_taken_out_leaves_no_tokens_in_the_prompt(
    server: ComfyServer, plain: np.ndarray
) -> None:
    """As by a program, which knows no bypassing."""
    graph, nodes = chain("UniID")
    for node in graph.workflow.values():
        for name, value in node["inputs"].items():
            if value == [nodes["rescale"].id, 0]:
                node["inputs"][name] = [nodes["world"].id, 0]
    assert np.array_equal(picture(server, graph, nodes), plain)


def test_face_identity_that_is_off_looks_at_no_photo(server: ComfyServer, plain: np.ndarray) -> None:
    graph = Graph()
    world, person = demo_world(graph)
    node = face_identity(graph, world, [person], class_word="man", off=True)
    graph.add("IDAdapterSaveIdentity", identity=node[3], name="nobody")
    save = drawn(graph, world, node[0], node[1], node[2])
    assert np.array_equal(picture(server, graph, {"save": save}), plain)
    assert not (server.base / "models" / "idadapter" / "identities" / "nobody.safetensors").exists()


def test_of_two_pictures_one_can_be_without(server: ComfyServer, plain: np.ndarray) -> None:
    """An adapter that is off in one place of two stays on in the other."""
    graph, nodes = chain("UniID")
    with_person = picture(server, graph, nodes)
    world = nodes["world"]
    text = graph.add("CLIPTextEncode", clip=world[1], text=TEXT.replace("<class word>", "man"))
    negative = graph.add("CLIPTextEncode", clip=world[1], text="")
    other = drawn(graph, world, world[0], text, negative)
    result = server.run(graph.workflow).check()
    assert np.array_equal(np.asarray(result.images_by_node[nodes["save"].id][0]), with_person)
    assert np.array_equal(np.asarray(result.images_by_node[other.id][0]), plain)


@pytest.fixture(scope="module")
def browser(server: ComfyServer) -> Iterator[Browser]:
    with Browser(server.url, timeout=30) as running:
        yield running


@pytest.mark.browser
@pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
)
@pytest.mark.parametrize("off", ["apply", "mix", "prompt", "rescale"])
def test_a_bypassed_node_is_sent_as_off(browser: Browser, off: str) -> None:
    graph, nodes = chain("UniID")
    browser.load_prompt(graph.workflow)
    node = f"window.app.rootGraph.getNodeById({nodes[off].id})"
    browser.evaluate(f"{node}.mode = {BYPASSED}")
    sent = browser.graph_to_prompt()
    assert set(sent) == set(graph.workflow)
    assert {number for number, entry in sent.items() if "off" in entry["inputs"]} == {nodes[off].id}
    assert browser.evaluate(f"{node}.mode") == BYPASSED
    (saved,) = browser.evaluate(
        "window.app.graphToPrompt().then((prompt) => prompt.workflow.nodes"
        f".filter((node) => node.id === {nodes[off].id}).map((node) => node.mode))"
    )
    assert saved == BYPASSED, "as it is saved with the picture"
    browser.evaluate(f"{node}.mode = 0")
    assert [entry for entry in browser.graph_to_prompt().values() if "off" in entry["inputs"]] == []
