"""ID Adapter Doctor and the line at startup, in the real server."""

from __future__ import annotations

import pytest

from tests.harness.server import ComfyServer
from tests.harness.workflow import Graph
from tests.tiny.files import ADAPTER_SD15, PACKAGE, RECOGNIZER

pytestmark = pytest.mark.server


def test_the_log_has_one_line_at_startup(server: ComfyServer) -> None:
    said = [line for line in server.log().splitlines() if "ComfyUI-IDAdapter 0." in line]
    assert len(said) == 1
    assert "in the model folders" in said[0]


def test_the_node_reports_and_looks_again_each_time(server: ComfyServer) -> None:
    graph = Graph()
    node = graph.add("IDAdapterDoctor", self_test=True)
    first = server.run(graph.workflow).check()
    report = first.outputs[node.id]["idadapter"]
    said = "\n".join(entry["text"] for entry in report)
    assert "ComfyUI 0." in said
    assert f"idadapter/{ADAPTER_SD15}: UniID, text and adapter branches, for " in said
    assert f"idadapter/recognizers/{RECOGNIZER}: an IResNet of 1/1/1/1 blocks" in said
    assert f"insightface/{PACKAGE}: detector " in said
    levels = [entry["level"] for entry in report]
    assert levels == sorted(levels, reverse=True), "warnings come first"
    assert any(entry["text"].startswith("ok: UniID draws a person of the demo world") for entry in report)
    again = server.run(graph.workflow).check()
    assert node.id in again.executed_nodes
