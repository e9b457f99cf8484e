"""Thumbnails in identity files: kept, shown, taken out, and never in the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import uniid_graph
from tests.tiny.files import PERSON

pytestmark = pytest.mark.server


def file_of(server: ComfyServer, name: str) -> Path:
    return server.base / "models" / "idadapter" / "identities" / f"{name}.safetensors"


def save(server: ComfyServer, name: str, **thumbnail: bool) -> tuple[str, list[Image.Image], np.ndarray]:
    """Returns what the node says, the pictures that it shows, and the crop that the recogniser saw."""
    graph, nodes = uniid_graph((PERSON,))
    saved = graph.add("IDAdapterSaveIdentity", identity=nodes["identity"], name=name, **thumbnail)
    crops = graph.add("PreviewImage", images=nodes["faces"][1])
    result = server.run(graph.workflow).check()
    (said,) = result.outputs[saved.id]["idadapter"]
    shown = result.images_by_node.get(saved.id, [])
    return said["text"], shown, np.asarray(result.images_by_node[crops.id][0])


def load(server: ComfyServer, name: str) -> list[Image.Image]:
    graph, nodes = uniid_graph((PERSON,))
    loaded = graph.add("IDAdapterLoadIdentity", identity=f"{name}.safetensors", adapter=nodes["adapter"])
    graph.add("IDAdapterSaveIdentity", identity=loaded, name=name)
    return server.run(graph.workflow).check().images_by_node.get(loaded.id, [])


def difference(picture: Image.Image, crop: np.ndarray) -> int:
    return int(np.abs(np.asarray(picture.convert("RGB")).astype(int) - crop[..., :3].astype(int)).max())


def test_the_face_is_kept_and_shown(server: ComfyServer) -> None:
    said, (shown,), crop = save(server, "with a face")
    assert said.startswith("Saved as with a face.safetensors")
    assert difference(shown, crop) <= 1, "rounded once more"
    assert load_file(file_of(server, "with a face"))["thumbnail"].shape == (112, 112, 3)
    (again,) = load(server, "with a face")
    assert difference(again, crop) <= 1


def test_it_can_be_left_out_and_taken_out(server: ComfyServer) -> None:
    _, shown, _ = save(server, "numbers only", thumbnail=False)
    assert shown == []
    with safe_open(file_of(server, "numbers only"), "pt") as file:
        assert "thumbnail" not in file.keys()  # noqa: SIM118
    said, _, _ = save(server, "numbers only")
    assert said.endswith("held this identity; the thumbnail was added.")
    said, _, _ = save(server, "numbers only", thumbnail=False)
    assert said.endswith("held this identity; the thumbnail was taken out.")
    said, _, _ = save(server, "numbers only", thumbnail=False)
    assert said.endswith("holds this identity already.")


def test_a_file_with_something_else_as_its_thumbnail_is_refused(server: ComfyServer) -> None:
    save(server, "odd")
    path = file_of(server, "odd")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["thumbnail"] = tensors["thumbnail"].float()
    path.unlink()
    save_file(tensors, path, metadata)
    graph, nodes = uniid_graph((PERSON,))
    loaded = graph.add("IDAdapterLoadIdentity", identity="odd.safetensors", adapter=nodes["adapter"])
    graph.add("IDAdapterSaveIdentity", identity=loaded, name="odd again")
    error = server.run(graph.workflow).error
    assert error is not None
    assert "this file has thumbnail" in error.message
