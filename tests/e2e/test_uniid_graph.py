"""UniID in the real server, from a photo to a picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.harness.results import difference, picture, picture_halves, pictures, text_of
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    NONE,
    add_apply,
    add_attach,
    add_extract,
    add_half_mask,
    add_mix,
    add_photos,
    add_prompt,
    add_text,
    rewire,
    uniid_graph,
)
from tests.harness.workflow import Graph, Node, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ADAPTER_SD15, ADAPTER_SDXL, ASTRONAUT, PERSON, PHOTOS, STRANGER

pytestmark = pytest.mark.server
SDXL = CHECKPOINT_NAMES["sdxl"]


@pytest.fixture(scope="module")
def plain(server: ComfyServer) -> np.ndarray:
    """The picture of the unchanged model."""
    graph = Graph()
    add_text_to_image(graph, SDXL)
    return picture(server.run(graph.workflow))


@pytest.fixture(scope="module")
def with_identity(server: ComfyServer) -> np.ndarray:
    graph, _ = uniid_graph()
    return picture(server.run(graph.workflow))


def test_a_photo_becomes_a_picture(server: ComfyServer, plain: np.ndarray, with_identity: np.ndarray) -> None:
    assert with_identity.shape == plain.shape == (64, 64, 3)
    assert with_identity.std() > 10
    assert difference(with_identity, plain) > 1


def test_the_same_graph_gives_the_same_picture(server: ComfyServer, with_identity: np.ndarray) -> None:
    server.free()  # nothing comes from the cache
    graph, nodes = uniid_graph()
    result = server.run(graph.workflow)
    assert {nodes["sampler"].id, nodes["faces"].id, nodes["adapter"].id} <= set(result.executed_nodes)
    assert np.array_equal(picture(result), with_identity)


def test_every_branch_changes_the_picture(server: ComfyServer, plain: np.ndarray) -> None:
    seen = [plain]
    for weight, rescale, id_prompt in ((1.0, False, False), (1.0, True, False), (0.0, False, True)):
        graph, _ = uniid_graph(weight=weight, rescale=rescale, id_prompt=id_prompt)
        seen.append(picture(server.run(graph.workflow)))
    for position, one in enumerate(seen):
        for other in seen[position + 1 :]:
            assert difference(one, other) > 0.5


@pytest.mark.parametrize("rescale", [False, True])
def test_weight_zero_is_the_plain_model(server: ComfyServer, plain: np.ndarray, rescale: bool) -> None:
    graph, _ = uniid_graph(weight=0.0, rescale=rescale, id_prompt=False)
    assert np.array_equal(picture(server.run(graph.workflow)), plain)


def test_another_person_gives_another_picture(server: ComfyServer, with_identity: np.ndarray) -> None:
    graph, _ = uniid_graph((STRANGER,))
    assert difference(picture(server.run(graph.workflow)), with_identity) > 0.3


def test_a_real_photo_gives_preview_crop_and_report(server: ComfyServer) -> None:
    graph, nodes = uniid_graph((ASTRONAUT,))
    crops = graph.add("PreviewImage", images=nodes["faces"][1])
    mask = graph.add("MaskToImage", mask=nodes["faces"][2])
    boxes = graph.add("PreviewImage", images=mask)
    preview = graph.add("PreviewImage", images=nodes["faces"][3])
    report = add_text(graph, nodes["faces"], 4)
    info = add_text(graph, nodes["adapter"], 1)
    prompt = add_text(graph, nodes["prompt"], 1)
    result = server.run(graph.workflow).check()
    (crop,), (box,), (shown,) = (result.images_by_node[node.id] for node in (crops, boxes, preview))
    assert crop.size == (112, 112)
    assert box.size == shown.size == (512, 512)
    inside = np.argwhere(np.asarray(box)[..., 0] > 127)
    (top, left), (bottom, right) = inside.min(0), inside.max(0)
    assert top < 101 < 141 < bottom
    assert left < 203 < 247 < right
    assert f"image 1 of 1 ({ASTRONAUT}, 512x512): 1 face found" in text_of(result, report.id)
    assert "UniID, text and adapter branches" in text_of(result, info.id)
    assert text_of(result, prompt.id) in ("portrait photo of a man", "portrait photo of a woman")


def add_second_person(graph: Graph, nodes: dict[str, Node], photo: str) -> Node:
    faces = add_extract(graph, add_photos(graph, (photo,)), nodes["analyzer"])
    return add_mix(graph, nodes["adapter"], faces)


def two_people(left: str, right: str, rescale: bool = True) -> Graph:
    """Two identities in one graph, each in its half of the picture by a mask."""
    graph, nodes = uniid_graph((left,), rescale=rescale, id_prompt=False, size=128)
    second = add_second_person(graph, nodes, right)
    left_mask, right_mask = (add_half_mask(graph, side, 128) for side in ("left", "right"))
    rewire(graph, nodes["apply"], attn_mask=left_mask)
    both = add_apply(graph, nodes["apply"], nodes["adapter"], second, attn_mask=right_mask[0])
    if rescale:
        rewire(graph, nodes["rescale"], model=both)
    else:
        rewire(graph, nodes["sampler"], model=both)
    return graph


def test_two_people_side_by_side(server: ComfyServer) -> None:
    """Both act, each in its own half: exchanging them, or one of them for the other, gives another picture."""
    cast = [(PERSON, STRANGER), (STRANGER, PERSON), (PERSON, PERSON), (STRANGER, STRANGER)]
    seen = [picture(server.run(two_people(*people).workflow)) for people in cast]
    for position, one in enumerate(seen):
        for other in seen[position + 1 :]:
            assert difference(one, other) > 0.3


def test_one_person_in_both_halves_is_that_person_everywhere(server: ComfyServer) -> None:
    halves = picture(server.run(two_people(PERSON, PERSON, rescale=False).workflow))
    graph, _ = uniid_graph(rescale=False, id_prompt=False, size=128)
    whole = picture(server.run(graph.workflow))
    assert np.abs(halves - whole).max() <= 1


def test_the_same_identity_twice_at_half_weight_is_once_at_full_weight(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(rescale=False, weight=1.0)
    once = picture(server.run(graph.workflow))
    graph, nodes = uniid_graph(rescale=False, weight=0.5)
    twice = add_apply(graph, nodes["apply"], nodes["adapter"], nodes["identity"], weight=0.5)
    rewire(graph, nodes["sampler"], model=twice)
    assert np.abs(picture(server.run(graph.workflow)) - once).max() <= 1


@pytest.fixture
def saved_identity(server: ComfyServer) -> Iterator[str]:
    """Saved by a run of the server."""
    name = "somebody.safetensors"
    path = server.models_dir / "idadapter" / "identities" / name
    graph, nodes = uniid_graph()
    saved = graph.add("IDAdapterSaveIdentity", identity=nodes["identity"], name="somebody")
    assert saved.id in server.run(graph.workflow).check().executed_nodes
    assert path.is_file()
    yield name
    path.unlink()


def test_a_saved_identity_gives_the_same_picture(
    server: ComfyServer, saved_identity: str, with_identity: np.ndarray
) -> None:
    graph, nodes = uniid_graph()
    loaded = graph.add("IDAdapterLoadIdentity", identity=saved_identity, adapter=nodes["adapter"])
    for role in ("apply", "prompt"):
        rewire(graph, nodes[role], identity=loaded)
    for role in ("photos", "analyzer", "faces", "identity"):
        del graph.workflow[nodes[role].id]
    server.free()
    assert np.array_equal(picture(server.run(graph.workflow)), with_identity)


def test_one_file_with_both_branches_is_the_same_adapter(
    server: ComfyServer, with_identity: np.ndarray
) -> None:
    graph, _ = uniid_graph(adapter=ADAPTER_SDXL, text_branch=NONE)
    assert np.abs(picture(server.run(graph.workflow)) - with_identity).max() <= 1


@pytest.mark.parametrize("mode", ["concatenate", "mean"])
def test_four_photos_of_one_person(server: ComfyServer, with_identity: np.ndarray, mode: str) -> None:
    graph, nodes = uniid_graph(PHOTOS)
    graph.workflow[nodes["identity"].id]["inputs"]["mode"] = mode
    crops = graph.add("PreviewImage", images=nodes["faces"][1])
    result = server.run(graph.workflow).check()
    assert len(result.images_by_node[crops.id]) == 4
    four = np.asarray(result.images_by_node[nodes["save"].id][0], dtype=np.int16)
    assert difference(four, with_identity) > 0.05


def test_four_times_the_same_photo_is_that_photo(server: ComfyServer, with_identity: np.ndarray) -> None:
    graph, _ = uniid_graph((PERSON,) * 4)
    assert np.abs(picture(server.run(graph.workflow)) - with_identity).max() <= 1


def test_a_photo_of_weight_zero_is_left_out(server: ComfyServer, with_identity: np.ndarray) -> None:
    graph, nodes = uniid_graph((PERSON, STRANGER))
    graph.workflow[nodes["identity"].id]["inputs"]["weights"] = "1, 0"
    # Not bit-equal everywhere: a face network's rounding may depend on how many photos it sees at once.
    levels = np.abs(picture(server.run(graph.workflow)) - with_identity)
    assert levels.max() <= 1


def test_an_sd15_adapter_on_sd15(server: ComfyServer) -> None:
    graph = Graph()
    add_text_to_image(graph, CHECKPOINT_NAMES["sd15"])
    plain_sd15 = picture(server.run(graph.workflow))
    graph, _ = uniid_graph(kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE)
    assert difference(picture(server.run(graph.workflow)), plain_sd15) > 1
    graph, _ = uniid_graph(kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE, weight=0.0, id_prompt=False)
    assert np.array_equal(picture(server.run(graph.workflow)), plain_sd15)


def test_a_batch_of_pictures(server: ComfyServer) -> None:
    graph, _ = uniid_graph(batch=4)
    results = pictures(server.run(graph.workflow))
    assert len(results) == 4
    assert all(difference(one, other) > 1 for one, other in zip(results, results[1:], strict=False))


def halves(server: ComfyServer, left: str, right: str) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of a picture with a prompt for each of them, to which the people in these photos are attached.

    One step, and each half decoded by itself, so that nothing carries over from one to the other.
    """
    graph, nodes = uniid_graph((PERSON,), rescale=True, id_prompt=False, size=128, steps=1)
    people = [add_second_person(graph, nodes, photo) for photo in (left, right)]
    text = graph.add("CLIPTextEncode", clip=nodes["checkpoint"][1], text="a photo")
    prompts = [add_attach(graph, text, identity) for identity in people]
    return picture_halves(server, graph, nodes, prompts)


def test_an_identity_attached_to_a_region_acts_there_and_nowhere_else(server: ComfyServer) -> None:
    left, right = halves(server, PERSON, STRANGER)
    same, changed = halves(server, PERSON, ASTRONAUT)
    assert np.array_equal(left, same)
    assert difference(right, changed) > 0.3
    # The identity wired to Apply is that of the left person: attaching another one replaces it.
    changed, same = halves(server, STRANGER, STRANGER)
    assert difference(left, changed) > 0.3
    assert np.array_equal(right, same)


def test_a_prompt_without_apply_is_an_ordinary_one(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    rewire(graph, nodes["sampler"], model=nodes["checkpoint"])
    without = Graph()
    add_text_to_image(without, SDXL, prompt="portrait photo of a man")
    assert difference(picture(server.run(graph.workflow)), picture(server.run(without.workflow))) == 0


def test_the_class_word_can_be_chosen(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    prompt = add_prompt(graph, nodes["checkpoint"], nodes["identity"], "a <class word> and a <class word>")
    graph.workflow[prompt.id]["inputs"]["class_word"] = "girl"
    shown = add_text(graph, prompt, 1)
    assert text_of(server.run(graph.workflow).check(), shown.id) == "a girl and a girl"
