"""Masks from Faces in the real server, on a picture of two people of the demo world."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness.server import ComfyServer
from tests.harness.workflow import Graph, Node

pytestmark = pytest.mark.server


def masks_of_two(graph: Graph, people: int, grow: float = 1.0) -> Node:
    world = graph.add("IDAdapterLoadDemoWorld", adapter="UniID")
    left, right = (graph.add("IDAdapterDemoPerson", person=n, photos=1, size=256) for n in (5, 7))
    both = graph.add(
        "ImageStitch",
        image1=left[0],
        image2=right[0],
        direction="right",
        match_image_size=True,
        spacing_width=0,
        spacing_color="white",
    )
    return graph.add("IDAdapterFaceMasks", image=both[0], analyzer=world[4], people=people, grow=grow)


def test_each_person_gets_a_mask_from_left_to_right(server: ComfyServer) -> None:
    graph = Graph()
    masks = masks_of_two(graph, 2)
    shown = []
    for slot in (0, 1, 2, 4):
        picture = graph.add("MaskToImage", mask=masks[slot])
        shown.append(graph.add("PreviewImage", images=picture[0]))
    result = server.run(graph.workflow).check()
    left, right, third, others = (
        np.asarray(result.images_by_node[node.id][0].convert("L")) > 127 for node in shown
    )
    assert left.shape == (256, 512)
    assert left[128, 128]
    assert right[128, 384]
    assert not left[:, 300:].any()
    assert not right[:, :212].any()
    assert not third.any(), "there are two people"
    assert (left.astype(int) + right + others == 1).all()
    assert len(result.images_by_node[masks.id]) == 1, "the node shows the boxes"


def test_more_people_than_faces_is_said(server: ComfyServer) -> None:
    graph = Graph()
    masks = masks_of_two(graph, 3)
    graph.add("PreviewImage", images=graph.add("MaskToImage", mask=masks[0])[0])
    error = server.run(graph.workflow).error
    assert error is not None
    assert error.node_id == masks.id
    assert "3 people are wanted, and only 2 faces were found; lower `people`" in error.message
