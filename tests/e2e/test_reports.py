"""What a program that talks to the server reads of reports and errors: UI output in the history, and exception types."""

from __future__ import annotations

import pytest

from tests.harness.runs import RunResult
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import NONE, uniid_graph
from tests.harness.workflow import Graph, Node
from tests.tiny.files import ADAPTER_SD15, EMPTY, GROUP, PERSON

pytestmark = pytest.mark.server

REPORTING = ("faces", "adapter", "identity", "prompt")


def graph_of(*photos: str) -> tuple[Graph, dict[str, Node]]:
    return uniid_graph(photos, kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE)


@pytest.fixture(scope="module")
def first(server: ComfyServer) -> tuple[Graph, dict[str, Node], RunResult]:
    server.free()
    graph, nodes = graph_of(PERSON, GROUP)
    return graph, nodes, server.run(graph.workflow).check()


def test_reports_and_pictures_are_in_the_history(first: tuple[Graph, dict[str, Node], RunResult]) -> None:
    _, nodes, result = first
    reports = {role: result.outputs[nodes[role].id]["idadapter"] for role in REPORTING}
    assert all(
        entry["text"] and entry["level"] in ("info", "warning")
        for report in reports.values()
        for entry in report
    )
    assert [entry["level"] for entry in reports["faces"]] == ["info", "info", "warning"]
    assert f"image 2 of 2 ({GROUP}, 640x640): 3 faces found" in reports["faces"][1]["text"]
    assert reports["identity"][0]["text"] == "used 2 of 2 photos"
    assert reports["prompt"][-1]["text"] == 'Encoded: "portrait photo of a man"'
    assert [image.size for image in result.images_by_node[nodes["faces"].id]] == [(640, 640)] * 2
    assert len(result.images_by_node[nodes["identity"].id]) == 1
    assert len(result.images) == 1, "the pictures of reports are not the workflow's result"


def test_they_are_sent_again_when_nothing_runs(
    server: ComfyServer, first: tuple[Graph, dict[str, Node], RunResult]
) -> None:
    """As for a page that was loaded anew and knows nothing of the first run."""
    graph, nodes, result = first
    again = server.run(graph.workflow).check()
    assert again.executed_nodes == []
    sent = {data["node"]: data["output"] for kind, data in again.messages if kind == "executed"}
    for role in REPORTING:
        node_id = nodes[role].id
        assert sent[node_id] == again.outputs[node_id] == result.outputs[node_id]


def test_the_type_of_an_error_is_its_short_name(server: ComfyServer) -> None:
    graph, nodes = graph_of(PERSON, EMPTY)
    result = server.run(graph.workflow)
    assert result.error is not None
    assert (result.error.node_id, result.error.exception_type) == (nodes["faces"].id, "NoFaceFoundError")
    assert f"image 2 of 2 ({EMPTY}, 640x640): no face found" in result.error.message
