"""Face Identity in the real server: it draws what the long chain draws, for every method, and finds its files by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from idadapter_core.demo_world.world import CFG, RESCALED, SAMPLER, STEPS
from tests.harness.server import ComfyServer
from tests.harness.workflow import Graph, Node

pytestmark = pytest.mark.server

TEXT = "a photo of a <class word> smiling at the beach"
AUTO = {
    "adapter": "auto",
    "text_branch": "auto",
    "package": "auto",
    "recognizer": "auto",
    "vision": "auto",
    "select": "largest",
    "index": 0,
    "on_missing": "error",
    "outliers": "reject",
    "class_word": "auto",
}


def demo_world(graph: Graph, method: str = "UniID", person: int = 3, photos: int = 1) -> tuple[Node, Node]:
    """The demo world's models, and photos of one of its people."""
    return graph.add("IDAdapterLoadDemoWorld", adapter=method), graph.add(
        "IDAdapterDemoPerson", person=person, photos=photos, size=256
    )


def face_identity(graph: Graph, world: Node, photos: list[Any], **given: Any) -> Node:
    values = {
        "text": TEXT,
        "negative": "",
        "strength": 1.0,
        **AUTO,
        "loaded_adapter": world[5],
        "loaded_analyzer": world[4],
        "clip_vision": world[3],
        **given,
    }
    node = graph.add("IDAdapterPersonalize", model=world[0], clip=world[1], **values)
    for number, photo in enumerate(photos, 1):
        graph.workflow[node.id]["inputs"][f"photos.photo_{number}"] = [photo.id, 0]
    return node


def drawn(graph: Graph, world: Node, model: Any, positive: Any, negative: Any, seed: int = 11) -> Node:
    """Sample and save: returns the node that saves."""
    latents = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    sampled = graph.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latents, seed=seed, steps=STEPS, cfg=CFG,
        sampler_name=SAMPLER, scheduler="simple", denoise=1.0,
    )  # fmt: skip
    picture = graph.add("VAEDecode", samples=sampled, vae=world[2])
    return graph.add("SaveImage", images=picture, filename_prefix="face_identity")


def short(server: ComfyServer, method: str, photos: int = 1, **given: Any) -> np.ndarray:
    graph = Graph()
    world, person = demo_world(graph, method, photos=photos)
    node = face_identity(graph, world, [person], **given)
    saved = drawn(graph, world, node[0], node[1], node[2])
    (picture,) = server.run(graph.workflow).check().images_by_node[saved.id]
    return np.asarray(picture)


def long(server: ComfyServer, method: str, photos: int = 1, *, rescaled: bool) -> np.ndarray:
    graph = Graph()
    world, person = demo_world(graph, method, photos=photos)
    faces = graph.add(
        "IDAdapterExtractFaces", image=person, analyzer=world[4], clip_vision=world[3], select="largest", index=0, on_missing="error"
    )  # fmt: skip
    identity = graph.add(
        "IDAdapterMixFeatures", adapter=world[5], faces=faces, mode="auto", references=0, weights="", outliers="reject"
    )  # fmt: skip
    positive = graph.add(
        "IDAdapterPrompt", clip=world[1], identity=identity, text=TEXT, class_word="auto", token_weight=1.0
    )
    negative = graph.add("CLIPTextEncode", clip=world[1], text="")
    model = graph.add(
        "IDAdapterApply", model=world[0], adapter=world[5], identity=identity, weight=1.0, start_percent=0.0, end_percent=1.0
    )  # fmt: skip
    if rescaled:
        model = graph.add(
            "IDAdapterRescale",
            model=model,
            mode="normalized",
            scope="ID adapters",
            gated=False,
            **vars(RESCALED),
        )
    saved = drawn(graph, world, model, positive, negative)
    (picture,) = server.run(graph.workflow).check().images_by_node[saved.id]
    return np.asarray(picture)


def base(server: ComfyServer, text: str) -> np.ndarray:
    graph = Graph()
    world, _ = demo_world(graph)
    positive, negative = (graph.add("CLIPTextEncode", clip=world[1], text=words) for words in (text, ""))
    saved = drawn(graph, world, world[0], positive, negative)
    (picture,) = server.run(graph.workflow).check().images_by_node[saved.id]
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("method", "photos", "rescaled"),
    [("UniID", 1, True), ("UniID", 3, True), ("IDAdapter", 4, False), ("IP-Adapter FaceID", 1, False)],
)
def test_it_draws_exactly_what_the_long_chain_draws(
    server: ComfyServer, method: str, photos: int, rescaled: bool
) -> None:
    picture = short(server, method, photos)
    assert np.array_equal(picture, long(server, method, photos, rescaled=rescaled))
    assert not np.array_equal(picture, base(server, TEXT.replace("<class word>", "man")))


def test_strength_0_is_the_model_alone(server: ComfyServer) -> None:
    for class_word, noun in (("woman", "woman"), ("auto", "man")):
        picture = short(server, "UniID", strength=0.0, class_word=class_word)
        assert np.array_equal(picture, base(server, TEXT.replace("<class word>", noun)))


def test_another_strength_runs_what_follows_only(server: ComfyServer) -> None:
    """It costs no more than the long chain: photos are not looked at again, and nothing is loaded again."""
    graph = Graph()
    world, person = demo_world(graph)
    node = face_identity(
        graph, world, [person], text="a photo of a <class word> in the snow", negative="a comic"
    )
    drawn(graph, world, node[0], node[1], node[2])
    first = server.run(graph.workflow).check()
    parts = {name.rpartition(".")[2] for name in first.executed_nodes if name.startswith(f"{node.id}.")}
    assert parts == {"faces", "identity", "positive", "negative", "model", "rescale"}
    graph.workflow[node.id]["inputs"]["strength"] = 1.5
    again = server.run(graph.workflow).check()
    parts = {name.rpartition(".")[2] for name in again.executed_nodes if name.startswith(f"{node.id}.")}
    assert parts == {"rescale"}
    assert {world.id, person.id} <= set(again.cached_nodes)
    assert server.run(graph.workflow).check().executed_nodes == []


def test_what_its_parts_report_is_told_as_its_own(server: ComfyServer) -> None:
    """Photos of three shapes; the reports name the node's strength, the faces and the prompt."""
    graph = Graph()
    world, person = demo_world(graph)
    small = graph.add(
        "ImageScale", image=person, upscale_method="area", width=224, height=256, crop="disabled"
    )
    node = face_identity(graph, world, [person, small], strength=0.5)
    drawn(graph, world, node[0], node[1], node[2])
    result = server.run(graph.workflow).check()
    reports = [
        (
            data["node"],
            "\n".join(message["text"] for message in data["output"]["idadapter"]),
            data["output"].get("images"),
        )
        for kind, data in result.messages
        if kind == "executed" and data["display_node"] == node.id
    ]
    ((_, together, pictures),) = reports
    assert len(pictures) == 2
    assert "Strength 0.5: Normalized Identity Rescaling with adapter_early" in together
    assert "image 2 of 2" in together
    assert 'Class word: "man"' in together


def test_its_identity_goes_on(server: ComfyServer) -> None:
    graph = Graph()
    world, person = demo_world(graph)
    node = face_identity(graph, world, [person])
    graph.add("IDAdapterSaveIdentity", identity=node[3], name="from face identity")
    server.run(graph.workflow).check()
    graph = Graph()
    world, _ = demo_world(graph)
    loaded = graph.add("IDAdapterLoadIdentity", identity="from face identity.safetensors", adapter=world[5])
    graph.add("IDAdapterSaveIdentity", identity=loaded, name="from face identity")
    server.run(graph.workflow).check()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": float("nan")}, "strength must be"),
        ({"loaded_adapter": None}, "`adapter` is auto, and models/idadapter holds several files for it"),
        ({"loaded_adapter": None, "adapter": "missing.safetensors"}, "value_not_in_list"),
    ],
)
def test_what_cannot_be_is_said_in_words(server: ComfyServer, given: dict[str, Any], message: str) -> None:
    graph = Graph()
    world, person = demo_world(graph)
    node = face_identity(graph, world, [person], **given)
    if given.get("loaded_adapter", ...) is None:
        del graph.workflow[node.id]["inputs"]["loaded_adapter"]
    drawn(graph, world, node[0], node[1], node[2])
    result = server.run(graph.workflow)
    assert message in result.describe()
    if result.error is not None:
        assert result.error.node_id == node.id, "told on the node that the user sees"


def test_a_model_that_it_did_not_make_is_noticed(server: ComfyServer) -> None:
    graph = Graph()
    world, person = demo_world(graph)
    node = face_identity(graph, world, [person])
    drawn(graph, world, world[0], node[1], node[2])
    told = server.run(graph.workflow).check().told[node.id, "graph"]
    assert [text for text in told if "Wire this node's `model` to the sampler" in text]
