"""IDAdapter's workflow, with the nodes and files of the test server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.harness.uniid_graph import (
    FROM_PACKAGE,
    NONE,
    add_adapter,
    add_analyzer,
    add_apply,
    add_extract,
    add_mix,
    add_photos,
    add_prompt,
    rewire,
)
from tests.harness.workflow import Graph, Node, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import CLIP_VISION, PERSON
from tests.tiny.idadapter import FILE_NAMES


def add_clip_vision(graph: Graph, name: str = CLIP_VISION) -> Node:
    return graph.add("CLIPVisionLoader", clip_name=name)


def idadapter_graph(
    photos: Sequence[str] = (PERSON,),
    *,
    kind: str = "sdxl",
    adapter: str = "",
    clip_vision: str | None = CLIP_VISION,
    weight: float = 1.0,
    id_prompt: bool = True,
    **text_to_image: Any,
) -> tuple[Graph, dict[str, Node]]:
    """Build the whole workflow, from photos to SaveImage. Returns it and its nodes by role.

    In addition to the roles of `add_text_to_image`: photos, analyzer, clip_vision, faces, adapter, identity, apply, and, if requested,
    prompt. `adapter` defaults to the one for this kind of checkpoint; `clip_vision` None leaves it out.
    """
    graph = Graph()
    nodes = add_text_to_image(graph, CHECKPOINT_NAMES[kind], **text_to_image)
    nodes["photos"] = add_photos(graph, photos)
    nodes["analyzer"] = add_analyzer(graph, recognizer=FROM_PACKAGE)
    if clip_vision is not None:
        nodes["clip_vision"] = add_clip_vision(graph, clip_vision)
    nodes["faces"] = add_extract(
        graph, nodes["photos"], nodes["analyzer"], clip_vision=nodes.get("clip_vision")
    )
    nodes["adapter"] = add_adapter(graph, adapter or FILE_NAMES[kind], NONE)
    nodes["identity"] = add_mix(graph, nodes["adapter"], nodes["faces"])
    nodes["apply"] = add_apply(graph, nodes["checkpoint"], nodes["adapter"], nodes["identity"], weight=weight)
    rewire(graph, nodes["sampler"], model=nodes["apply"])
    if id_prompt:
        nodes["prompt"] = add_prompt(graph, nodes["checkpoint"], nodes["identity"])
        rewire(graph, nodes["sampler"], positive=nodes["prompt"])
    return graph, nodes
