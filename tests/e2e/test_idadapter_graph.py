"""IDAdapter in the real server, from photos to a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.harness.idadapter_graph import idadapter_graph
from tests.harness.results import difference, largest_difference, picture, picture_halves, pictures, text_of
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    add_adapter,
    add_analyzer,
    add_apply,
    add_attach,
    add_extract,
    add_half_mask,
    add_mix,
    add_photos,
    add_prompt,
    add_rescale,
    add_text,
    rewire,
)
from tests.harness.workflow import Graph, Node, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ASTRONAUT, PERSON, PHOTOS, STRANGER
from tests.tiny.idadapter import FILE_NAMES, FRESH_NAMES, RESAMPLED_NAME
from tests.tiny.lora import LORA_NAMES

pytestmark = pytest.mark.server
KINDS = ("sd15", "sd21", "sdxl")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(server: ComfyServer, kind: str) -> np.ndarray:
    """The picture of the unchanged model."""
    graph = Graph()
    add_text_to_image(graph, CHECKPOINT_NAMES[kind])
    return picture(server.run(graph.workflow))


@pytest.fixture(scope="module")
def with_identity(server: ComfyServer, kind: str) -> np.ndarray:
    graph, _ = idadapter_graph(kind=kind)
    return picture(server.run(graph.workflow))


def run(server: ComfyServer, *arguments: Any, **options: Any) -> np.ndarray:
    """The picture of `idadapter_graph`."""
    graph, _ = idadapter_graph(*arguments, **options)
    return picture(server.run(graph.workflow))


# --- each model family ---


def test_photos_become_a_picture(
    server: ComfyServer, plain: np.ndarray, with_identity: np.ndarray, kind: str
) -> None:
    assert with_identity.shape == plain.shape == (64, 64, 3)
    assert with_identity.std() > 10
    assert difference(with_identity, plain) > 1


def test_the_gated_layers_and_the_word_both_act(
    server: ComfyServer, plain: np.ndarray, with_identity: np.ndarray, kind: str
) -> None:
    def word(photo: str) -> np.ndarray:
        """ID Prompt alone. One class word for all: the photos would say man or woman."""
        graph, nodes = idadapter_graph((photo,), kind=kind, weight=0.0)
        graph.workflow[nodes["prompt"].id]["inputs"]["class_word"] = "person"
        return picture(server.run(graph.workflow))

    def layers(photo: str) -> np.ndarray:
        """Apply alone, with an ordinary prompt."""
        return run(server, (photo,), kind=kind, id_prompt=False)

    seen = [plain, with_identity, word(PERSON), layers(PERSON), word(STRANGER), layers(STRANGER)]
    assert all(difference(one, other) > 0.2 for i, one in enumerate(seen) for other in seen[:i])


def test_weight_zero_is_the_plain_model(server: ComfyServer, plain: np.ndarray, kind: str) -> None:
    assert np.array_equal(run(server, kind=kind, weight=0.0, id_prompt=False), plain)


def test_a_fresh_adapter_is_the_plain_model(server: ComfyServer, plain: np.ndarray, kind: str) -> None:
    assert np.array_equal(run(server, kind=kind, adapter=FRESH_NAMES[kind], id_prompt=False), plain)


def with_lora(kind: str, place: str) -> Graph:
    """A LoRA that changes the K weights of the cross-attention, as the adapter does, "before" or "after" Apply."""
    graph, nodes = idadapter_graph(kind=kind)
    model = nodes["checkpoint" if place == "before" else "apply"]
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=LORA_NAMES[kind], strength_model=0.8)
    rewire(graph, nodes["apply" if place == "before" else "sampler"], model=lora)
    return graph


def test_a_lora_on_the_same_weights_works_before_and_after(
    server: ComfyServer, with_identity: np.ndarray, kind: str
) -> None:
    before, after = (picture(server.run(with_lora(kind, place).workflow)) for place in ("before", "after"))
    assert largest_difference(before, after) <= 1
    assert difference(before, with_identity) > 0.5


def test_the_same_graph_gives_the_same_picture(
    server: ComfyServer, with_identity: np.ndarray, kind: str
) -> None:
    server.free()  # nothing comes from the cache
    graph, nodes = idadapter_graph(kind=kind)
    result = server.run(graph.workflow)
    assert {nodes["sampler"].id, nodes["faces"].id, nodes["adapter"].id} <= set(result.executed_nodes)
    assert np.array_equal(picture(result), with_identity)


# --- what runs again ---


def test_queued_again_nothing_runs(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(seed=31)
    first = server.run(graph.workflow).check()
    again = server.run(graph.workflow).check()
    assert again.executed_nodes == []
    assert set(again.cached_nodes) == {*first.executed_nodes, *first.cached_nodes}


def test_a_changed_weight_needs_no_photo(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(seed=32)
    first = picture(server.run(graph.workflow))
    graph.workflow[nodes["apply"].id]["inputs"]["weight"] = 0.5
    changed = server.run(graph.workflow).check()
    assert set(changed.executed_nodes) == {nodes[role].id for role in ("apply", "sampler", "decoder", "save")}
    graph.workflow[nodes["apply"].id]["inputs"]["weight"] = 1.0
    assert difference(picture(changed), first) > 0.5
    server.free()
    # What the other weight did to the model is gone.
    assert np.array_equal(picture(server.run(graph.workflow)), first)


def test_the_plain_model_is_unharmed_in_one_queue(server: ComfyServer) -> None:
    """Without unloading anything in between: the weights are those of the checkpoint again."""
    plain_graph = Graph()
    nodes = add_text_to_image(plain_graph, CHECKPOINT_NAMES["sdxl"], seed=33)
    before = picture(server.run(plain_graph.workflow))
    run(server, seed=33, id_prompt=False)
    plain_graph.workflow[nodes["sampler"].id]["inputs"]["steps"] = 5  # else the picture comes from the cache
    server.run(plain_graph.workflow).check()
    plain_graph.workflow[nodes["sampler"].id]["inputs"]["steps"] = 4
    result = server.run(plain_graph.workflow)
    assert nodes["sampler"].id in result.executed_nodes
    assert np.array_equal(picture(result), before)


# --- several photos ---


def test_four_photos_of_one_person(server: ComfyServer) -> None:
    one = run(server)
    seen = [one]
    for mode in ("learned", "concatenate", "mean"):
        graph, nodes = idadapter_graph(PHOTOS)
        graph.workflow[nodes["identity"].id]["inputs"]["mode"] = mode
        crops = graph.add("PreviewImage", images=nodes["faces"][1])
        result = server.run(graph.workflow).check()
        assert len(result.images_by_node[crops.id]) == 4
        four = np.asarray(result.images_by_node[nodes["save"].id][0], dtype=np.int16)
        assert all(not np.array_equal(four, other) for other in seen)
        assert difference(four, one) > 0.1
        seen.append(four)


def test_learned_is_what_auto_means(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(PHOTOS)
    auto = picture(server.run(graph.workflow))
    graph.workflow[nodes["identity"].id]["inputs"]["mode"] = "learned"
    assert np.array_equal(picture(server.run(graph.workflow)), auto)


def test_four_times_the_same_photo_is_that_photo(server: ComfyServer) -> None:
    """As the paper gives its adapter one photo."""
    assert largest_difference(run(server, (PERSON,) * 4), run(server)) <= 1


def test_a_photo_of_weight_zero_is_left_out(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph((PERSON, STRANGER))
    graph.workflow[nodes["identity"].id]["inputs"]["weights"] = "1, 0"
    assert largest_difference(picture(server.run(graph.workflow)), run(server)) <= 1


def test_an_adapter_that_resamples_its_tokens(server: ComfyServer) -> None:
    person = run(server, PHOTOS, adapter=RESAMPLED_NAME)
    assert difference(person, run(server, (STRANGER,), adapter=RESAMPLED_NAME)) > 0.5
    assert difference(person, run(server, PHOTOS)) > 0.5


# --- several people ---


def add_person(graph: Graph, nodes: dict[str, Node], photo: str) -> Node:
    photos = add_photos(graph, (photo,))
    faces = add_extract(graph, photos, nodes["analyzer"], clip_vision=nodes["clip_vision"])
    return add_mix(graph, nodes["adapter"], faces)


def two_people(left: str, right: str) -> Graph:
    """Two identities in one graph, each in its half of the picture by a mask."""
    graph, nodes = idadapter_graph((left,), id_prompt=False, size=128)
    second = add_person(graph, nodes, right)
    left_mask, right_mask = (add_half_mask(graph, side, 128) for side in ("left", "right"))
    rewire(graph, nodes["apply"], attn_mask=left_mask)
    both = add_apply(graph, nodes["apply"], nodes["adapter"], second, attn_mask=right_mask[0])
    rewire(graph, nodes["sampler"], model=both)
    return graph


def test_two_people_side_by_side(server: ComfyServer) -> None:
    """Both act, each in its own half: exchanging them, or one of them for another, gives another picture."""
    cast = [(PERSON, STRANGER), (STRANGER, PERSON), (PERSON, ASTRONAUT), (ASTRONAUT, STRANGER)]
    seen = [picture(server.run(two_people(*people).workflow)) for people in cast]
    assert all(difference(one, other) > 0.5 for i, one in enumerate(seen) for other in seen[:i])


def test_the_same_identity_twice_at_half_weight_is_once_at_full_weight(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(weight=0.5)
    twice = add_apply(graph, nodes["apply"], nodes["adapter"], nodes["identity"], weight=0.5)
    rewire(graph, nodes["sampler"], model=twice)
    assert largest_difference(picture(server.run(graph.workflow)), run(server)) <= 1


def halves(server: ComfyServer, left: str, right: str) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of a picture with a prompt for each of them, to which the people in these photos are attached.

    One step, and each half decoded by itself, so that nothing carries over from one to the other.
    """
    graph, nodes = idadapter_graph(id_prompt=False, size=128, steps=1)
    people = [add_person(graph, nodes, photo) for photo in (left, right)]
    prompts = [
        add_attach(graph, add_prompt(graph, nodes["checkpoint"], identity, "a photo"), identity)
        for identity in people
    ]
    return picture_halves(server, graph, nodes, prompts)


def test_in_an_area_acts_who_its_prompt_names(server: ComfyServer) -> None:
    left, right = halves(server, PERSON, STRANGER)
    same, changed = halves(server, PERSON, ASTRONAUT)
    assert np.array_equal(left, same)
    assert difference(right, changed) > 0.3
    # The identity wired to Apply is that of the left person: attaching another one replaces it.
    changed, same = halves(server, STRANGER, STRANGER)
    assert difference(left, changed) > 0.3
    assert np.array_equal(right, same)


# --- identities as files ---


@pytest.fixture
def saved_identity(server: ComfyServer) -> Iterator[str]:
    """Of four photos, saved by a run of the server."""
    name = "idadapter_person.safetensors"
    path = server.models_dir / "idadapter" / "identities" / name
    graph, nodes = idadapter_graph(PHOTOS[:3])
    saved = graph.add("IDAdapterSaveIdentity", identity=nodes["identity"], name="idadapter_person")
    assert saved.id in server.run(graph.workflow).check().executed_nodes
    assert path.is_file()
    yield name
    path.unlink()


def test_a_saved_identity_gives_the_same_picture(server: ComfyServer, saved_identity: str) -> None:
    """Of three photos where the adapter expects four, so that their shares of the attention are saved, too."""
    graph, nodes = idadapter_graph(PHOTOS[:3])
    expected = picture(server.run(graph.workflow))
    loaded = graph.add("IDAdapterLoadIdentity", identity=saved_identity, adapter=nodes["adapter"])
    for role in ("apply", "prompt"):
        rewire(graph, nodes[role], identity=loaded)
    for role in ("analyzer", "clip_vision", "faces", "identity"):
        del graph.workflow[nodes[role].id]
    server.free()
    assert np.array_equal(picture(server.run(graph.workflow)), expected)


# --- with other things ---


def test_a_batch_of_pictures(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(batch=2)
    first, second = pictures(server.run(graph.workflow))
    assert difference(first, second) > 1
    graph, _ = idadapter_graph((STRANGER,), batch=2)
    others = pictures(server.run(graph.workflow))
    assert difference(first, others[0]) > 0.5
    assert difference(second, others[1]) > 0.5
    # Alone, the first of a batch is the same picture.
    assert largest_difference(run(server), first) <= 1


def test_later_windows_take_over(server: ComfyServer) -> None:
    def windows(first: str, second: str) -> np.ndarray:
        graph, nodes = idadapter_graph((first,), id_prompt=False)
        graph.workflow[nodes["apply"].id]["inputs"]["end_percent"] = 0.2
        later = add_person(graph, nodes, second)
        model = add_apply(graph, nodes["apply"], nodes["adapter"], later, start_percent=0.2)
        rewire(graph, nodes["sampler"], model=model)
        return picture(server.run(graph.workflow))

    one = windows(PERSON, STRANGER)
    assert difference(one, windows(PERSON, ASTRONAUT)) > 0.5
    assert difference(one, windows(ASTRONAUT, STRANGER)) > 0.5


def test_rescaling_leaves_the_gated_layers_alone_unless_told(server: ComfyServer) -> None:
    def rescaled(**settings: Any) -> np.ndarray:
        graph, nodes = idadapter_graph()
        rewire(graph, nodes["sampler"], model=add_rescale(graph, nodes["apply"], **settings))
        return picture(server.run(graph.workflow))

    as_trained = run(server)
    assert np.array_equal(rescaled(), as_trained)
    assert np.array_equal(rescaled(gated=False), as_trained)
    gated = rescaled(gated=True)
    assert difference(gated, as_trained) > 0.5
    assert difference(rescaled(gated=True, adapter_late=0.5), gated) > 0.5
    assert np.array_equal(rescaled(mode="off", gated=True), as_trained)


def test_beside_uniid_on_one_model(server: ComfyServer) -> None:
    """A person of each method; the order of the two does not matter."""

    def both(idadapter_first: bool) -> np.ndarray:
        graph, nodes = idadapter_graph(id_prompt=False)
        uniid = add_adapter(graph)
        faces = add_extract(graph, add_photos(graph, (STRANGER,)), add_analyzer(graph))
        stranger = add_mix(graph, uniid, faces)
        if idadapter_first:
            model = add_apply(graph, nodes["apply"], uniid, stranger)
        else:
            rewire(graph, nodes["apply"], model=add_apply(graph, nodes["checkpoint"], uniid, stranger))
            model = nodes["apply"]
        rewire(graph, nodes["sampler"], model=model)
        return picture(server.run(graph.workflow))

    one = both(True)
    assert largest_difference(one, both(False)) <= 1
    assert difference(one, run(server, id_prompt=False)) > 0.5


def test_texts_say_what_was_loaded_found_and_encoded(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(PHOTOS[:2], kind="sd15")
    shown = [
        add_text(graph, nodes[role], slot).id
        for role, slot in (("adapter", 1), ("faces", 4), ("identity", 1), ("prompt", 1))
    ]
    result = server.run(graph.workflow).check()
    info, faces, mix, prompt = (text_of(result, node) for node in shown)
    assert info.startswith(f"{FILE_NAMES['sd15']}: IDAdapter, N = 4 references, ")
    assert "CLIP vision of width 64 with 16 patches" in info
    assert "identity word (1 embedding) for the text encoders l 64" in info
    assert "negative prompts: without the adapters" in info
    assert f"image 2 of 2 ({PHOTOS[1]}, 640x640): 1 face found" in faces
    assert mix.splitlines()[:3] == ["used 2 of 2 photos", "photo 1: weight 0.5", "photo 2: weight 0.5"]
    assert prompt == "portrait photo of a man, man is sks"


def test_the_info_of_an_adapter_that_resamples_its_tokens(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(adapter=RESAMPLED_NAME)
    shown = add_text(graph, nodes["adapter"], 1).id
    info = text_of(server.run(graph.workflow).check(), shown)
    assert "identity tokens: resampled to 8" in info
    assert "identity word (1 embedding) for the text encoders l 64, g 64" in info


def test_an_untrained_adapter_is_called_so(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(adapter=FRESH_NAMES["sdxl"])
    shown = add_text(graph, nodes["adapter"], 1).id
    result = server.run(graph.workflow).check()
    assert "Note: it is untrained" in text_of(result, shown)
