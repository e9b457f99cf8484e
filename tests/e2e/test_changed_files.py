"""Model files and identities that change on the disk while the server runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from idadapter_core.adapter import save_adapter
from idadapter_core.identity import identical, load_identity
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    NONE,
    add_adapter,
    add_analyzer,
    add_extract,
    add_mix,
    add_photos,
    add_text,
)
from tests.harness.workflow import Graph
from tests.tiny.files import ADAPTER, PERSON, TEXT_BRANCH
from tests.tiny.uniid import TINY_SDXL, tiny_uniid

pytestmark = pytest.mark.server


@pytest.fixture
def put(server: ComfyServer) -> Iterator[Callable[[str], Path]]:
    """Paths for new files below models/idadapter, which are gone after the test."""
    made: list[Path] = []

    def path_of(name: str) -> Path:
        made.append(server.models_dir / "idadapter" / name)
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        return made[-1]

    yield path_of
    for path in made:
        path.unlink(missing_ok=True)


def test_a_trained_adapter_exported_again_under_its_name_is_loaded(
    server: ComfyServer, put: Callable[[str], Path]
) -> None:
    path = put("again.safetensors")
    save_adapter(tiny_uniid(TINY_SDXL, seed=3), path)
    graph = Graph()
    adapter = add_adapter(graph, path.name, NONE)
    faces = add_extract(graph, add_photos(graph, [PERSON]), add_analyzer(graph))
    report = add_text(graph, add_mix(graph, adapter, faces), 1)
    first = server.run(graph.workflow).check()
    assert adapter.id in first.executed_nodes
    assert server.run(graph.workflow).check().executed_nodes == []
    save_adapter(tiny_uniid(TINY_SDXL, seed=4), path)
    again = server.run(graph.workflow).check()
    assert {adapter.id, report.id} <= set(again.executed_nodes)
    assert faces.id in again.cached_nodes


def test_a_loaded_file_that_is_cut_short_does_no_harm(
    server: ComfyServer, put: Callable[[str], Path]
) -> None:
    """A copy over the file that is under way when the next prompt comes."""
    path = put("short.safetensors")
    save_adapter(tiny_uniid(TINY_SDXL, seed=3), path)
    graph = Graph()
    adapter = add_adapter(graph, path.name, NONE)
    faces = add_extract(graph, add_photos(graph, [PERSON]), add_analyzer(graph))
    mix = add_mix(graph, adapter, faces)
    add_text(graph, mix, 1)
    server.run(graph.workflow).check()
    path.write_bytes(path.read_bytes()[:1000])
    result = server.run(graph.workflow)
    assert result.error is not None
    assert "short.safetensors: cannot be read (1,000 bytes)" in result.error.message
    other = Graph()
    add_text(other, add_adapter(other, ADAPTER, TEXT_BRANCH), 1)
    server.run(other.workflow).check()  # it is still there


def test_a_saved_identity_that_was_deleted_is_saved_again(
    server: ComfyServer, put: Callable[[str], Path]
) -> None:
    path = put("identities/deleted.safetensors")
    graph = Graph()
    adapter = add_adapter(graph)
    faces = add_extract(graph, add_photos(graph, [PERSON]), add_analyzer(graph))
    saved = graph.add("IDAdapterSaveIdentity", identity=add_mix(graph, adapter, faces), name="deleted")
    server.run(graph.workflow).check()
    identity = load_identity(path)
    assert server.run(graph.workflow).check().executed_nodes == []
    path.unlink()
    assert server.run(graph.workflow).check().executed_nodes == [saved.id]
    assert identical(load_identity(path), identity)
    assert server.run(graph.workflow).check().executed_nodes == []
