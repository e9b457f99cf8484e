"""CLIP vision beside the faces, in the real server: the stock loader's model goes into Extract Face Features."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.harness.runs import RunResult
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    FROM_PACKAGE,
    add_analyzer,
    add_extract,
    add_photos,
    add_text,
    rewire,
)
from tests.harness.workflow import Graph
from tests.tiny.files import CLIP_VISION, CLIP_VISION_NARROW, PERSON, STRANGER
from tests.tiny.vision import NARROW_WIDTH, WIDTH

pytestmark = pytest.mark.server


def features_graph(photo: str, clip_vision: str | None) -> tuple[Graph, str]:
    """Features of a photo, shown as text, and the id of the node that shows them."""
    graph = Graph()
    faces = add_extract(graph, add_photos(graph, [photo]), add_analyzer(graph, recognizer=FROM_PACKAGE))
    if clip_vision is not None:
        rewire(graph, faces, clip_vision=graph.add("CLIPVisionLoader", clip_name=clip_vision))
    return graph, add_text(graph, faces, 0).id


def shown_features(server: ComfyServer, photo: str, clip_vision: str | None) -> str:
    """The features as Python writes them; long tensors are cut short."""
    graph, shown = features_graph(photo, clip_vision)
    result: RunResult = server.run(graph.workflow).check()
    assert set(result.executed_nodes) | set(result.cached_nodes) == set(graph.workflow)
    return "".join(result.outputs[shown]["text"])


def class_embedding(features: str) -> np.ndarray:
    """Its numbers, with four digits after the point."""
    found = re.search(r"class_embedding=tensor\(\[\[(.*?)\]\]", features, re.DOTALL)
    assert found is not None, features
    return np.array([float(number) for number in found[1].split(",")])


@pytest.mark.parametrize(("clip_vision", "width"), [(CLIP_VISION, WIDTH), (CLIP_VISION_NARROW, NARROW_WIDTH)])
def test_the_stock_loader_feeds_the_face_features(server: ComfyServer, clip_vision: str, width: int) -> None:
    features = shown_features(server, PERSON, clip_vision)
    numbers = class_embedding(features)
    assert numbers.shape == (width,)
    assert np.isfinite(numbers).all()
    assert "patch_tokens=tensor(" in features
    assert "nan" not in features
    stranger = class_embedding(shown_features(server, STRANGER, clip_vision))
    assert np.abs(stranger - numbers).max() > 0.01


def test_clip_vision_adds_to_the_features_and_changes_nothing_else(server: ComfyServer) -> None:
    without, with_clip = (shown_features(server, PERSON, clip) for clip in (None, CLIP_VISION))
    assert "patch_tokens=None, class_embedding=None" in without
    others = [re.split(r"patch_tokens=.*?, faces=", text, flags=re.DOTALL) for text in (without, with_clip)]
    assert len(others[0]) == 2
    # Which model it was, and the views that methods read of it.
    others = [
        [re.sub(r", vision='\w*', views=\{.*\}\)$", ")", part, flags=re.DOTALL) for part in text]
        for text in others
    ]
    assert others[0] == others[1]
