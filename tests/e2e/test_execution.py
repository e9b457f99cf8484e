"""What the server runs again, what it can interrupt, and what the pack costs before it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.comfy import REPOSITORY
from tests.harness.server import ComfyServer, server_environment
from tests.harness.uniid_graph import add_analyzer, add_extract, add_photos, rewire, uniid_graph
from tests.harness.workflow import Graph
from tests.tiny.files import PERSON, RECOGNIZER, bring_face_package, bring_recognizer

pytestmark = pytest.mark.server

UNWANTED = ("insightface", "onnxruntime", "onnx", "cv2", "transformers", "scipy", "skimage", "torchvision")


def test_a_changed_weight_needs_no_photo(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(seed=21)
    first = server.run(graph.workflow).check()
    graph.workflow[nodes["apply"].id]["inputs"]["weight"] = 0.7
    second = server.run(graph.workflow).check()
    assert nodes["sampler"].id in first.executed_nodes
    ran = {nodes[role].id for role in ("apply", "rescale", "sampler", "decoder", "save")}
    assert set(second.executed_nodes) == ran
    assert {
        nodes[role].id for role in ("photos", "analyzer", "faces", "adapter", "identity", "prompt")
    } <= set(second.cached_nodes)


def test_a_changed_schedule_needs_no_photo(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(seed=22)
    server.run(graph.workflow).check()
    graph.workflow[nodes["rescale"].id]["inputs"]["adapter_late"] = 1.0
    second = server.run(graph.workflow).check()
    assert set(second.executed_nodes) == {
        nodes[role].id for role in ("rescale", "sampler", "decoder", "save")
    }


def test_an_unchanged_graph_runs_nothing(server: ComfyServer) -> None:
    graph, _ = uniid_graph(seed=23)
    first = server.run(graph.workflow).check()
    again = server.run(graph.workflow).check()
    assert again.executed_nodes == []
    assert set(again.cached_nodes) == {*first.executed_nodes, *first.cached_nodes}


def many_photos(count: int) -> tuple[Graph, str]:
    """Features of `count` photos; the id of the node that extracts them."""
    graph = Graph()
    repeated = graph.add("RepeatImageBatch", image=add_photos(graph, [PERSON]), amount=count)
    faces = add_extract(graph, repeated, add_analyzer(graph))
    graph.add("PreviewImage", images=faces[1])
    return graph, faces.id


def interrupt_at(server: ComfyServer, node: str) -> Callable[[str, dict[str, Any]], None]:
    """A listener that presses cancel when the node reports its first progress."""

    def listen(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == node and data["value"] == 1:
            server.interrupt()

    return listen


def test_extraction_reports_its_progress(server: ComfyServer) -> None:
    graph, node = many_photos(6)
    result = server.run(graph.workflow).check()
    progress = [data for kind, data in result.messages if kind == "progress" and data["node"] == node]
    values = [data["value"] for data in progress]  # the server leaves some out where they come too fast
    assert values[0] == 1
    assert values[-1] == 6
    assert values == sorted(set(values))
    assert {data["max"] for data in progress} == {6}


def test_opening_the_face_models_reports_progress_and_the_provider(server: ComfyServer) -> None:
    server.free()
    graph = Graph()
    node = add_analyzer(graph)
    graph.add("PreviewAny", source=node)
    result = server.run(graph.workflow).check()
    progress = [data for kind, data in result.messages if kind == "progress" and data["node"] == node.id]
    assert (progress[0]["value"], progress[-1]["value"]) == (1, 3)
    assert {data["max"] for data in progress} == {3}
    assert "face models run on CPU" in result.log


def test_extraction_can_be_interrupted(server: ComfyServer) -> None:
    graph, node = many_photos(300)
    result = server.run(graph.workflow, on_message=interrupt_at(server, node))
    assert result.interrupted
    assert result.error is None
    reached = max(
        data["value"] for kind, data in result.messages if kind == "progress" and data["node"] == node
    )
    assert reached < 300
    graph, _ = many_photos(2)
    server.run(graph.workflow).check()


def test_sampling_with_an_identity_can_be_interrupted(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(seed=24, steps=3)
    expected = server.run(graph.workflow).check().images[0].tobytes()
    sampler = graph.workflow[nodes["sampler"].id]["inputs"]
    sampler["steps"] = 5000
    result = server.run(graph.workflow, on_message=interrupt_at(server, nodes["sampler"].id))
    assert result.interrupted
    assert result.error is None
    assert result.images == []
    # Nothing of the broken-off run stays on the models.
    server.free()
    sampler["steps"] = 3
    assert server.run(graph.workflow).check().images[0].tobytes() == expected


def test_importing_the_pack_brings_none_of_the_heavy_packages(comfyui: Path) -> None:
    program = """
import json, sys
from tests.harness.comfy import import_comfy, pack_nodes
import_comfy()
import comfy_api.latest, comfy.model_management, comfy.model_patcher, comfy.ldm.modules.attention, folder_paths, nodes
before = set(sys.modules)
names = list(pack_nodes())
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"nodes": names, "new": new}))
"""
    answer = run_python(program, comfyui)
    assert "IDAdapterExtractFaces" in answer["nodes"]
    assert "ComfyUI_IDAdapter" in answer["new"]
    assert set(answer["new"]) & set(UNWANTED) == set()


def run_python(program: str, comfyui: Path) -> Any:
    """What a program prints, as JSON, in a process of its own."""
    environment = {**server_environment(), "COMFYUI_PATH": str(comfyui)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def hide_insightface(base: Path) -> None:
    """A `Writer`: makes insightface and onnxruntime unimportable before ComfyUI loads any pack."""
    folder = base / "custom_nodes" / "hide_insightface"
    folder.mkdir()
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    (folder / "prestartup_script.py").write_text(
        "import sys\n\nsys.modules['insightface'] = sys.modules['onnxruntime'] = None\n",
        encoding="utf-8",
    )


def test_without_insightface_the_pack_loads_and_says_what_to_install(comfyui: Path) -> None:
    with ComfyServer(comfyui, writers=[bring_face_package, bring_recognizer, hide_insightface]) as bare:
        assert "IMPORT FAILED" not in bare.log()
        assert bare.object_info("IDAdapterApply")
        for recognizer in ("from package", RECOGNIZER):
            graph = Graph()
            graph.add("PreviewAny", source=add_analyzer(graph, recognizer=recognizer))
            result = bare.run(graph.workflow)
            assert result.error is not None
            message = result.error.message
            assert "face analysis needs insightface and onnxruntime" in message
            assert "python -m pip install insightface onnxruntime" in message
            assert "restart" in message


def test_the_graph_can_be_changed_after_a_run(server: ComfyServer) -> None:
    """Nodes that are taken out leave nothing behind on the model."""
    graph, nodes = uniid_graph(seed=25, id_prompt=False)
    server.run(graph.workflow).check()
    rewire(graph, nodes["sampler"], model=nodes["checkpoint"])
    after = server.run(graph.workflow).check().images[0].tobytes()
    server.free()
    assert server.run(graph.workflow).check().images[0].tobytes() == after
