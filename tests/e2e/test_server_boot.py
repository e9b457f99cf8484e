"""The real server starts with the pack, and tells clearly what it refuses."""

from __future__ import annotations

import pytest

from tests.harness.server import PACK_NAME, ComfyServer
from tests.harness.workflow import Graph, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES

pytestmark = pytest.mark.server


def test_all_custom_nodes_import(server: ComfyServer) -> None:
    log = server.log()
    assert "Import times for custom nodes" in log
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log


def test_the_pack_brings_its_nodes(server: ComfyServer) -> None:
    modules = {info["python_module"] for info in server.object_info().values()}
    assert f"custom_nodes.{PACK_NAME}" in modules


def test_the_stock_loader_offers_the_tiny_checkpoints(server: ComfyServer) -> None:
    loader = server.object_info("CheckpointLoaderSimple")
    assert set(CHECKPOINT_NAMES.values()) <= set(loader["input"]["required"]["ckpt_name"][0])


def test_an_unknown_node_is_reported(server: ComfyServer) -> None:
    graph = Graph()
    graph.add("NoSuchNode")
    result = server.run(graph.workflow)
    assert not result.ok
    assert "NoSuchNode" in result.rejection
    assert result.executed_nodes == []


def test_an_unknown_file_is_reported_at_its_node(server: ComfyServer) -> None:
    graph = Graph()
    nodes = add_text_to_image(graph, "missing.safetensors")
    result = server.run(graph.workflow)
    assert "prompt_outputs_failed_validation" in result.rejection
    (error,) = result.node_errors[nodes["checkpoint"].id]
    assert "ckpt_name" in error
    assert "missing.safetensors" in error
    with pytest.raises(AssertionError, match=r"missing\.safetensors"):
        result.check()


def test_an_exception_in_a_node_is_reported(server: ComfyServer) -> None:
    broken = server.models_dir / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    try:
        graph = Graph()
        nodes = add_text_to_image(graph, broken.name)
        result = server.run(graph.workflow)
    finally:
        broken.unlink()
    assert result.error is not None
    assert result.error.node_id == nodes["checkpoint"].id
    assert result.error.node_type == "CheckpointLoaderSimple"
    assert result.error.message
    assert result.images == []
