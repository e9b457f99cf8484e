"""Messages in ComfyUI where an identity does not fit, or its file is damaged or something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from idadapter_core.adapter import load_adapter
from tests.e2e.bad_input.refusals import (
    load_identity_graph,
    refusal,
    refused_adapter,
    weights,
    write_identity,
)
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    NONE,
    add_adapter,
    add_analyzer,
    add_extract,
    add_mix,
    add_photos,
    rewire,
    uniid_graph,
)
from tests.harness.workflow import Graph
from tests.tiny.files import ADAPTER_SD15, PERSON, STRANGER

pytestmark = pytest.mark.server


def test_an_identity_of_another_recogniser(
    server: ComfyServer, put: Callable[[str], Path], other_recogniser: str
) -> None:
    path = put("idadapter/identities/other.safetensors")
    digest = load_adapter(server.models_dir / "idadapter" / other_recogniser).digest
    write_identity(server, path, recognizer="fedcba9876543210", adapter=digest)
    graph = load_identity_graph(path.name, other_recogniser, NONE)
    message = refusal(server, graph, "IDAdapterLoadIdentity")
    assert "other.safetensors was made with the face recogniser fedcba9876543210" in message
    assert "0123456789abcdef" in message
    assert "Make the identity again" in message


def test_an_identity_of_another_adapter(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/foreign.safetensors")
    write_identity(server, path, adapter="00000000deadbeef")
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "foreign.safetensors was made with another adapter (weights 00000000deadbeef)" in message
    assert "make the identity again" in message


def test_an_identity_of_another_adapter_at_apply(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(id_prompt=False)
    rewire(graph, nodes["apply"], adapter=add_adapter(graph, ADAPTER_SD15, NONE))
    message = refusal(server, graph, "IDAdapterApply")
    assert "was made with another adapter" in message
    assert ADAPTER_SD15 in message


def test_a_truncated_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/half.safetensors")
    write_identity(server, path)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "half.safetensors: cannot be read" in message
    assert "truncated" in message


def test_an_adapter_as_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/adapter.safetensors")
    shutil.copy(server.models_dir / "idadapter" / ADAPTER_SD15, path)
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "this file holds an adapter, not an identity" in message


def test_an_identity_as_adapter(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identity.safetensors")
    write_identity(server, path)
    assert "this file holds an identity, not an adapter" in refused_adapter(server, path.name)


def test_a_foreign_file_as_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/lora.safetensors")
    save_file(weights("lora_unet_down_blocks_0.lora_up.weight"), path)
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "lora.safetensors: not an identity file" in message
    assert "this is a LoRA" in message


def save_graph(name: str, photo: str = PERSON) -> Graph:
    graph = Graph()
    faces = add_extract(graph, add_photos(graph, [photo]), add_analyzer(graph))
    identity = add_mix(graph, add_adapter(graph), faces)
    graph.add("IDAdapterSaveIdentity", identity=identity, name=name)
    return graph


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "", "  ", "C:\\x", "..", ".hidden", "a\nb", "nul?", "CON", "x" * 200, "名" * 100, "/x/y"],
)
def test_an_identity_name_that_is_no_file_name(server: ComfyServer, name: str) -> None:
    message = refusal(server, save_graph(name), "IDAdapterSaveIdentity")
    assert "must be a plain file name without folders" in message
    assert repr(name) in message
    assert "models/idadapter/identities" in message


def test_another_identity_is_not_overwritten(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/taken.safetensors")
    server.run(save_graph("taken").workflow).check()
    content = path.read_bytes()
    server.run(save_graph("taken.safetensors").workflow).check()  # the same person again
    message = refusal(server, save_graph("taken", STRANGER), "IDAdapterSaveIdentity")
    assert "taken.safetensors already holds another identity and is not overwritten" in message
    assert "Choose another name" in message
    assert path.read_bytes() == content
