"""Messages in ComfyUI where a value, a mask or a prompt cannot be, and that the server goes on working."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.e2e.bad_input.refusals import refusal
from tests.harness.idadapter_graph import idadapter_graph
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import add_prompt, rewire, uniid_graph
from tests.harness.workflow import Graph, Node
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import EMPTY, PERSON, STRANGER

pytestmark = pytest.mark.server


# --- numbers ---


def test_numbers_that_are_none_from_the_prompt_and_from_another_node(server: ComfyServer) -> None:
    """ComfyUI's own limits let NaN through, and check nothing that comes over a link."""
    nan, far = float("nan"), 10**12
    graph, nodes = uniid_graph()
    enriched = graph.add(
        "IDAdapterEnrich", image=nodes["photos"], count=1, seed=0, flip=True, rotation=10.0, colour=0.1
    )
    rewire(graph, nodes["faces"], image=enriched)
    told = []
    for entry in list(graph.workflow.values()):
        if not entry["class_type"].startswith("IDAdapter"):
            continue
        info = server.object_info(entry["class_type"])["input"]
        for name, (kind, *_) in {**info["required"], **info.get("optional", {})}.items():
            if kind not in ("FLOAT", "INT"):
                continue
            given = entry["inputs"][name]
            sources: list[Any] = [nan, graph.add("PrimitiveFloat", value=nan)[0]]
            if kind == "INT":
                sources = [graph.add("PrimitiveInt", value=-far)[0]]
            for source in sources:
                entry["inputs"][name] = source
                message = refusal(server, graph, entry["class_type"])
                assert f": {name} must be a" in message, message
                assert f"got {nan if kind == 'FLOAT' else -far}" in message
            entry["inputs"][name] = given
            told.append(name)
    assert {
        "index",
        "references",
        "weight",
        "early_fraction",
        "token_weight",
        "count",
        "seed",
        "colour",
    } <= set(told)


# --- values ---


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("1, a", ["numbers separated by commas", "'1, a'"]),
        ("1, 2, 3", ["3 weights were given for 2 faces", "one number per face"]),
        ("0, 0", ["all weights are 0", "at least one face"]),
        ("1, -1", ["at least 0", "-1"]),
        ("1, nan", ["finite", "nan"]),
        ("1, inf", ["finite", "inf"]),
    ],
)
@pytest.mark.parametrize("build", [uniid_graph, idadapter_graph])
def test_weights_that_cannot_be(
    server: ComfyServer, build: Callable[..., Any], weights: str, words: list[str]
) -> None:
    graph, nodes = build((PERSON, STRANGER))
    graph.workflow[nodes["identity"].id]["inputs"]["weights"] = weights
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert all(word in message for word in words), message


def test_learned_mixing_with_uniid(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    graph.workflow[nodes["identity"].id]["inputs"]["mode"] = "learned"
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "UniID has no learned mixing" in message
    assert "concatenate or mean" in message


def test_a_window_that_ends_before_it_starts(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    graph.workflow[nodes["apply"].id]["inputs"].update(start_percent=0.8, end_percent=0.2)
    message = refusal(server, graph, "IDAdapterApply")
    assert "start_percent (0.8) lies after end_percent (0.2)" in message
    assert "exchange them" in message


def with_mask(mask: Callable[[Graph], Node]) -> Graph:
    graph, nodes = uniid_graph(id_prompt=False)
    rewire(graph, nodes["apply"], attn_mask=mask(graph))
    return graph


@pytest.mark.parametrize("size", [(64, 64), (1000, 333), (7, 5), (1, 1)])
def test_a_mask_of_another_size(server: ComfyServer, size: tuple[int, int]) -> None:
    width, height = size
    white = with_mask(lambda graph: graph.add("SolidMask", value=1.0, width=width, height=height))
    image = np.asarray(server.run(white.workflow).check().images[0], dtype=np.int16)
    without, _ = uniid_graph(id_prompt=False)
    expected = np.asarray(server.run(without.workflow).check().images[0], dtype=np.int16)
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "words"), [("nan", "not finite numbers"), ("four dimensions", "(1, 1, 8, 8)")]
)
def test_a_broken_mask(server: ComfyServer, kind: str, words: str) -> None:
    def broken(graph: Graph) -> Node:
        mask = graph.add("SolidMask", value=1.0, width=8, height=8)
        return graph.add("TinySpoilMask", mask=mask, kind=kind)

    message = refusal(server, with_mask(broken), "IDAdapterApply")
    assert "attn_mask" in message
    assert words in message


def test_a_prompt_of_300_tokens(server: ComfyServer) -> None:
    def image(text: str) -> np.ndarray:
        graph, nodes = uniid_graph()
        rewire(
            graph, nodes["sampler"], positive=add_prompt(graph, nodes["checkpoint"], nodes["identity"], text)
        )
        return np.asarray(server.run(graph.workflow).check().images[0], dtype=np.int16)

    long = "a <class word> " + "very " * 297
    # The last word counts, so nothing was cut off.
    assert np.abs(image(long + "red") - image(long + "blue")).mean() > 0.01


def test_a_clip_of_another_model(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    other = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT_NAMES["sd15"])
    graph.workflow[nodes["prompt"].id]["inputs"]["clip"] = other[1]
    message = refusal(server, graph, "IDAdapterPrompt")
    assert "l 64, g 64" in message
    assert "this CLIP is that of a model with text encoders of widths l 64." in message
    assert "Wire the CLIP of a checkpoint" in message


def test_an_identity_attached_for_which_no_adapter_is_applied(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    attached = graph.add(
        "IDAdapterAttach", conditioning=nodes["positive"], identity=nodes["identity"], role="positive"
    )
    rewire(graph, nodes["rescale"], model=nodes["checkpoint"])
    rewire(graph, nodes["sampler"], positive=attached)
    message = refusal(server, graph, "KSampler")
    assert "adapters applied: none" in message
    assert "Add one Apply ID Adapter" in message


def test_two_identities_attached_to_one_application(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    text = nodes["positive"]
    for _ in range(2):
        text = graph.add("IDAdapterAttach", conditioning=text, identity=nodes["identity"], role="positive")
    rewire(graph, nodes["sampler"], positive=text)
    message = refusal(server, graph, "KSampler")
    assert "no Apply ID Adapter is left on this model" in message
    assert "Add one Apply ID Adapter" in message


def test_the_server_goes_on_working(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    expected = server.run(graph.workflow).check().images[0].tobytes()
    graph.workflow[nodes["photos"].id]["inputs"]["image"] = EMPTY
    refusal(server, graph, "IDAdapterExtractFaces")
    graph.workflow[nodes["photos"].id]["inputs"]["image"] = PERSON
    server.free()
    assert server.run(graph.workflow).check().images[0].tobytes() == expected
