"""Several photos of a person in the real server: a stranger among them, and few photos enriched to more."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.harness.runs import RunResult
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import add_photos, add_text, rewire, uniid_graph
from tests.harness.workflow import Graph, Node
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.files import PERSON, PHOTOS

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def other_person(server: ComfyServer) -> str:
    """Somebody else in front of a white wall.

    The tiny face network has random weights: it tells people apart by the whole of the crop, and STRANGER's has the same
    background as the others.
    """
    face = MarkedFace(320, 300, 90, identity=2, skin=(120, 130, 190))
    photo = synthesize(faces=[face], background=(250, 250, 250))
    return server.add_input_image("other_person.png", Image.fromarray(photo))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures, in levels of 255.

    1 is rounding: the face network's arithmetic depends a little on how many faces it is given at once.
    """
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def run_with_report(
    server: ComfyServer, graph: Graph, nodes: dict[str, Node]
) -> tuple[np.ndarray, list[str]]:
    """The picture, and the report of Mix Face Features."""
    report = add_text(graph, nodes["identity"], 1)
    result: RunResult = server.run(graph.workflow).check()
    (saved,) = result.images_by_node[nodes["save"].id]
    return np.asarray(saved), "".join(result.outputs[report.id]["text"]).splitlines()


def picture_of(server: ComfyServer, photos: tuple[str, ...], **mix: str) -> tuple[np.ndarray, list[str]]:
    graph, nodes = uniid_graph(photos)
    graph.workflow[nodes["identity"].id]["inputs"] |= mix
    return run_with_report(server, graph, nodes)


def test_a_stranger_among_four_photos_is_named_and_left_out(server: ComfyServer, other_person: str) -> None:
    """The graph names no way with outliers, as one saved before there was a choice."""
    start = len(server.log())
    picture, report = picture_of(server, (*PHOTOS[:2], other_person, *PHOTOS[2:]))
    assert report[0] == "used 4 of 5 photos"
    assert report[3].startswith("photo 3: left out, it disagrees with the others (cosine ")
    assert report[3].endswith("Probably another person.")
    assert f"Mix Face Features: {report[3]}" in server.log(start)
    alone, report = picture_of(server, PHOTOS)
    assert report[0] == "used 4 of 4 photos"
    assert difference(picture, alone) <= 1


def test_a_stranger_can_be_kept(server: ComfyServer, other_person: str) -> None:
    photos = (*PHOTOS, other_person)
    kept, report = picture_of(server, photos, outliers="keep")
    assert report[5].startswith("photo 5: disagrees with the others")
    rejected, _ = picture_of(server, photos, outliers="reject")
    assert difference(kept, rejected) > 5


def test_photos_of_other_shapes_have_sockets_of_their_own(server: ComfyServer) -> None:
    """Nothing is cropped, and a photo alone is described as in a batch."""
    with Image.open(server.input_dir / PERSON) as photo:
        wide = Image.new("RGB", (960, 640), (200, 200, 200))
        wide.paste(photo, (200, 0))
    name = server.add_input_image("wide_person.png", wide)
    graph, nodes = uniid_graph((PERSON,))
    more = graph.add("LoadImage", image=name)
    graph.workflow[nodes["faces"].id]["inputs"]["more_photos.photo_2"] = [more.id, 0]
    found = add_text(graph, nodes["faces"], 4)
    preview = graph.add("PreviewImage", images=nodes["faces"][3])
    boxes = graph.add("PreviewImage", images=graph.add("MaskToImage", mask=nodes["faces"][2]))
    result = server.run(graph.workflow).check()
    report = "".join(result.outputs[found.id]["text"])
    assert f"image 1 of 2 ({PERSON}, 640x640)" in report
    assert f"image 2 of 2 ({name}, 960x640)" in report
    assert [image.size for image in result.images_by_node[preview.id]] == [(960, 640)] * 2
    first, second = (np.asarray(image)[..., 0] > 0 for image in result.images_by_node[boxes.id])
    assert first.any()
    assert not first[:, 640:].any()
    both, either = first[:, :640] & second[:, 200:840], first[:, :640] | second[:, 200:840]
    assert both.sum() > 0.9 * either.sum(), "the same face, 200 pixels to the right"
    assert np.asarray(result.images_by_node[preview.id][0])[:, 640:].max() == 0


def test_one_photo_is_enriched_to_four(server: ComfyServer) -> None:
    """Not mirrored, and hardly in other colours: the tiny detector tells left from right by the colours of its dots."""
    graph, nodes = uniid_graph((PERSON,))
    enriched = graph.add(
        "IDAdapterEnrich", image=nodes["photos"], count=4, seed=1, flip=False, rotation=10.0, colour=0.05
    )
    rewire(graph, nodes["faces"], image=enriched)
    found = add_text(graph, nodes["faces"], 4)
    report = add_text(graph, nodes["identity"], 1)
    photos, crops = (graph.add("PreviewImage", images=source) for source in (enriched[0], nodes["faces"][1]))
    result = server.run(graph.workflow).check()
    given, *variants = result.images_by_node[photos.id]
    assert [image.size for image in variants] == [(640, 640)] * 3
    with Image.open(server.input_dir / PERSON) as photo:
        assert np.array_equal(np.asarray(given), np.asarray(photo))
    assert len(result.images_by_node[crops.id]) == 4
    assert "image 4 of 4 (640x640): 1 face found" in "".join(result.outputs[found.id]["text"])
    assert "used 4 of 4 photos" in "".join(result.outputs[report.id]["text"])
    (picture,) = result.images_by_node[nodes["save"].id]
    plain, _ = picture_of(server, (PERSON,))
    assert difference(np.asarray(picture), plain) > 1


def test_values_beyond_the_limits_of_enrich_are_refused(server: ComfyServer) -> None:
    graph = Graph()
    photos = add_photos(graph, (PERSON,))
    values = {"count": 17, "seed": 0, "flip": True, "rotation": 60.0, "colour": 0.15}
    enriched = graph.add("IDAdapterEnrich", image=photos, **values)
    graph.add("PreviewImage", images=enriched)
    errors = server.run(graph.workflow).node_errors[enriched.id]
    assert any("count" in error for error in errors)
    assert any("rotation" in error for error in errors)
