"""Messages in ComfyUI where a photo shows no face, or is no picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tests.e2e.bad_input.refusals import extract_graph, refused_photo
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import add_photos, add_text
from tests.harness.workflow import Graph, Node
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.files import CUT, EMPTY, GROUP, PERSON

pytestmark = pytest.mark.server


def test_no_face(server: ComfyServer) -> None:
    message = refused_photo(server, EMPTY)
    assert f"image 1 of 1 ({EMPTY}, 640x640): no face found" in message
    assert "looked at 640 to 128 px, with a border around it" in message
    assert "upright" in message


def test_no_face_in_one_photo_of_several(server: ComfyServer) -> None:
    message = refused_photo(server, lambda graph: add_photos(graph, [PERSON, EMPTY, PERSON]))
    assert f"image 2 of 3 ({EMPTY}, 640x640): no face found" in message
    assert "on_missing" in message


def test_a_photo_without_a_face_can_be_skipped(server: ComfyServer) -> None:
    graph, faces = extract_graph(lambda graph: add_photos(graph, [PERSON, EMPTY, PERSON]), on_missing="skip")
    report = add_text(graph, faces, 4)
    result = server.run(graph.workflow).check()
    assert len(result.images) == 2
    assert f"image 2 of 3 ({EMPTY}, 640x640): skipped, no face found" in result.outputs[report.id]["text"][0]


def test_no_face_in_any_photo_cannot_be_skipped(server: ComfyServer) -> None:
    message = refused_photo(server, lambda graph: add_photos(graph, [EMPTY, EMPTY]), on_missing="skip")
    assert "no photo shows a usable face" in message
    assert "image 2 of 2" in message


def test_an_index_beyond_the_faces(server: ComfyServer) -> None:
    message = refused_photo(server, GROUP, index=3)
    assert f"image 1 of 1 ({GROUP}, 640x640): asked for face 4 (index 3, largest), found 3" in message
    assert "lower the index" in message


def test_several_faces_are_reported(server: ComfyServer) -> None:
    graph, faces = extract_graph(GROUP, index=2, select="left to right")
    report = add_text(graph, faces, 4)
    text = server.run(graph.workflow).check().outputs[report.id]["text"][0]
    assert "3 faces found" in text
    assert "warning: several faces; used index 2 of 0 to 2" in text


def test_a_face_that_is_mostly_outside_the_photo(server: ComfyServer) -> None:
    message = refused_photo(server, CUT)
    assert f"image 1 of 1 ({CUT}, 160x150)" in message
    assert "of the face lies inside the photo, at least 50% are needed" in message
    assert "shows the whole face" in message


def test_a_face_with_broken_landmarks_does_not_count(server: ComfyServer) -> None:
    nan = synthesize(faces=[MarkedFace(320, 300, 90, has_nan=True)])
    name = server.add_input_image("nan_landmarks.png", Image.fromarray(nan))
    assert f"image 1 of 1 ({name}, 640x640): no face found" in refused_photo(server, name)


def test_an_image_of_one_pixel(server: ComfyServer) -> None:
    name = server.add_input_image("pixel.png", Image.new("RGB", (1, 1)))
    message = refused_photo(server, name)
    assert "image 1 of 1 is 1x1" in message
    assert "between 32 and 32766 px" in message


def test_a_photo_of_8k(server: ComfyServer) -> None:
    big = Image.fromarray(synthesize(1920, 1080, [MarkedFace(960, 500, 150, identity=1)]))
    name = server.add_input_image("8k.jpg", big.resize((7680, 4320), Image.Resampling.NEAREST))
    graph, faces = extract_graph(name)
    report = add_text(graph, faces, 4)
    result = server.run(graph.workflow).check()
    assert f"image 1 of 1 ({name}, 7680x4320): 1 face found" in result.outputs[report.id]["text"][0]
    assert result.images[0].size == (112, 112)


def spoiled(kind: str) -> Callable[[Graph], Node]:
    return lambda graph: graph.add("TinySpoilImage", image=add_photos(graph, [PERSON]), kind=kind)


def test_an_image_with_nan(server: ComfyServer) -> None:
    message = refused_photo(server, spoiled("nan"))
    assert "image 1 of 1 (640x640): 1.2% of its values are NaN or infinite" in message
    assert "VAE" in message


@pytest.mark.parametrize(
    ("kind", "found"),
    [("two channels", "(640, 640, 2)"), ("no batch", "(640, 640, 3)"), ("0 to 255", "values up to 255")],
)
def test_an_image_of_another_form(server: ComfyServer, kind: str, found: str) -> None:
    message = refused_photo(server, spoiled(kind))
    assert found in message


def with_alpha(graph: Graph) -> Node:
    opaque = graph.add("SolidMask", value=0.0, width=640, height=640)
    return graph.add("JoinImageWithAlpha", image=add_photos(graph, [PERSON]), alpha=opaque)


def test_an_image_with_alpha_is_the_same_photo(server: ComfyServer) -> None:
    graph, _ = extract_graph(PERSON)
    expected = server.run(graph.workflow).check().images[0]
    graph, _ = extract_graph(with_alpha)
    crop = server.run(graph.workflow).check().images[0]
    assert np.array_equal(np.asarray(crop), np.asarray(expected))


def test_a_grey_image_is_looked_at(server: ComfyServer) -> None:
    # The tiny detector sees colours only, so it finds nobody; that it was asked is what counts.
    assert "image 1 of 1 (640x640): no face found" in refused_photo(server, spoiled("grey"))
