"""Messages in ComfyUI where a face package or a recogniser is missing, incomplete or something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.bad_input.refusals import extract_graph, refusal
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import FROM_PACKAGE, add_analyzer, uniid_graph
from tests.harness.workflow import Graph
from tests.tiny.files import ADAPTER_SD15, PACKAGE, PERSON, RECOGNIZER

pytestmark = pytest.mark.server


@pytest.fixture
def package(server: ComfyServer) -> Iterator[Path]:
    """A copy of the package under another name, to be damaged."""
    root = server.models_dir / "insightface" / "models"
    copy = root / "copied"
    shutil.copytree(root / PACKAGE, copy)
    yield copy
    shutil.rmtree(copy)


def refused_package(server: ComfyServer, package: str, recognizer: str = FROM_PACKAGE) -> str:
    graph = Graph()
    graph.add("PreviewAny", source=add_analyzer(graph, package, recognizer))
    return refusal(server, graph, "IDAdapterLoadFaceAnalyzer")


def test_a_package_that_is_not_there_is_no_choice(server: ComfyServer) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=add_analyzer(graph, "antelopev2"))
    result = server.run(graph.workflow)
    (error,) = result.node_errors["1"]
    assert "antelopev2" in error
    assert PACKAGE in error


def test_no_package_at_all(server: ComfyServer) -> None:
    root = server.models_dir / "insightface"
    hidden = server.base / "insightface"
    root.rename(hidden)
    try:
        (hint,) = server.object_info("IDAdapterLoadFaceAnalyzer")["input"]["required"]["package"][1][
            "options"
        ]
        assert "models/insightface" in hint
        message = refused_package(server, hint)
    finally:
        hidden.rename(root)
    assert (
        f"the face package 'buffalo_l' was not found. Searched: {root / 'models' / 'buffalo_l'}, " in message
    )
    assert "github.com/deepinsight/insightface" in message
    assert "non-commercial" in message


def test_a_package_without_a_detector(server: ComfyServer, package: Path) -> None:
    (package / "det_10g.onnx").unlink()
    message = refused_package(server, "copied")
    assert f"{package} has no face detector" in message
    assert "w600k_r50.onnx (recognition)" in message
    assert "buffalo_l.zip" in message


def test_a_package_without_a_recogniser(server: ComfyServer, package: Path) -> None:
    (package / "w600k_r50.onnx").unlink()
    message = refused_package(server, "copied")
    assert f"{package} has no recognition model" in message
    assert "det_10g.onnx (detection)" in message
    # With a recogniser of its own it does.
    graph, _ = extract_graph(PERSON)
    graph.workflow["2"]["inputs"]["package"] = "copied"
    server.run(graph.workflow).check()


def test_a_damaged_package(server: ComfyServer, package: Path) -> None:
    file = package / "det_10g.onnx"
    file.write_bytes(file.read_bytes()[:20_000])
    message = refused_package(server, "copied")
    assert f"{file} (20,000 bytes) is not a complete ONNX model" in message
    assert "Delete it and get the package again" in message


def test_a_package_file_that_is_something_else(server: ComfyServer, package: Path) -> None:
    file = package / "w600k_r50.onnx"
    file.write_text("<html>404 not found</html>")
    message = refused_package(server, "copied")
    assert f"{file} (26 bytes) is not a complete ONNX model" in message


def test_an_adapter_as_recogniser(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/recognizers/wrong.safetensors")
    shutil.copy(server.models_dir / "idadapter" / ADAPTER_SD15, path)
    message = refused_package(server, PACKAGE, path.name)
    assert "wrong.safetensors" in message


def test_a_truncated_recogniser(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/recognizers/half.safetensors")
    path.write_bytes((path.parent / RECOGNIZER).read_bytes()[:100_000])
    message = refused_package(server, PACKAGE, path.name)
    assert "half.safetensors" in message


def test_features_of_the_packages_own_recogniser(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    graph.workflow[nodes["analyzer"].id]["inputs"]["recognizer"] = FROM_PACKAGE
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "In Load Face Analyzer set `recognizer` from 'from package' to UniID's network" in message
