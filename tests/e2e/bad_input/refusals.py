"""Shared by the tests of bad input: the message that stops a graph, and graphs that are stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idadapter_core import errors
from idadapter_core.adapter import load_adapter
from idadapter_core.identity import save_identity
from idadapter_core.types import Identity
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    NONE,
    add_adapter,
    add_analyzer,
    add_extract,
    add_photos,
    rewire,
    uniid_graph,
)
from tests.harness.workflow import Graph, Node
from tests.tiny.files import ADAPTER, TEXT_BRANCH

# Under their short names: ComfyUI puts the module's path before those of other packs.
ERRORS = {
    name
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, errors.IDAdapterError)
}


def refusal(server: ComfyServer, graph: Graph, node_type: str) -> str:
    """The text of the error that stops this graph in a node of this type."""
    result = server.run(graph.workflow)
    assert result.error is not None, f"no error; {result.describe()}"
    assert result.error.node_type == node_type, result.describe()
    # A message of ours, not an exception of some library's.
    assert result.error.exception_type in ERRORS, result.error
    return result.error.message


def extract_graph(image: Callable[[Graph], Node] | str, **extract: Any) -> tuple[Graph, Node]:
    """Features of a photo, shown as crops."""
    graph = Graph()
    photo = add_photos(graph, [image]) if isinstance(image, str) else image(graph)
    faces = add_extract(graph, photo, add_analyzer(graph), **extract)
    graph.add("PreviewImage", images=faces[1])
    return graph, faces


def refused_photo(server: ComfyServer, image: Callable[[Graph], Node] | str, **extract: Any) -> str:
    graph, _ = extract_graph(image, **extract)
    return refusal(server, graph, "IDAdapterExtractFaces")


def refused_adapter(server: ComfyServer, adapter: str, text_branch: str = NONE) -> str:
    graph = Graph()
    graph.add("PreviewAny", source=add_adapter(graph, adapter, text_branch))
    return refusal(server, graph, "IDAdapterLoadAdapter")


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 2) for name in names}


class Code:
    """Unpickled, it would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_identity(server: ComfyServer, path: Path, recognizer: str = "", **changes: Any) -> None:
    """An identity file as the SDXL adapter of two files would make one."""
    folder = server.models_dir / "idadapter"
    adapter = load_adapter(folder / ADAPTER, folder / TEXT_BRANCH)
    tokens = torch.zeros(1, adapter.config.adapter_tokens, adapter.config.context_width)
    text = {
        name: torch.ones(1, 4, width) for name, width in zip("lg", adapter.config.text_widths, strict=True)
    }
    values = {
        "adapter_tokens": tokens,
        "adapter_tokens_uncond": tokens,
        "text_tokens": text,
        "method": adapter.method,
        "adapter": adapter.digest,
        "recognizer": recognizer,
        **changes,
    }
    save_identity(Identity(**values), path)


def load_identity_graph(name: str, adapter: str = ADAPTER, text_branch: str = TEXT_BRANCH) -> Graph:
    graph, nodes = uniid_graph(adapter=adapter, text_branch=text_branch)
    loaded = graph.add("IDAdapterLoadIdentity", identity=name, adapter=nodes["adapter"])
    rewire(graph, nodes["apply"], identity=loaded)
    rewire(graph, nodes["prompt"], identity=loaded)
    return graph
