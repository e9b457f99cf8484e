"""Pieces of both methods' workflows, and UniID's whole workflow, with the nodes and files of the test server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.harness.workflow import Graph, Node, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ADAPTER, PACKAGE, PERSON, RECOGNIZER, TEXT_BRANCH

NONE = "none"
FROM_PACKAGE = "from package"
RESCALE = {
    "mode": "normalized",
    "adapter_early": 0.8,
    "adapter_late": 1.2,
    "text_early": 0.5,
    "text_late": 1.8,
    "early_fraction": 0.1667,
    "scope": "ID adapters",
}


def add_photos(graph: Graph, names: Sequence[str]) -> Node:
    """Add photos as one IMAGE batch."""
    first, *others = [graph.add("LoadImage", image=name) for name in names]
    for photo in others:
        first = graph.add("ImageBatch", image1=first, image2=photo)
    return first


def add_analyzer(graph: Graph, package: str = PACKAGE, recognizer: str = RECOGNIZER) -> Node:
    return graph.add("IDAdapterLoadFaceAnalyzer", package=package, recognizer=recognizer, provider="cpu")


def add_extract(
    graph: Graph,
    image: Node,
    analyzer: Node,
    *,
    clip_vision: Node | None = None,
    select: str = "largest",
    index: int = 0,
    on_missing: str = "error",
) -> Node:
    faces = graph.add(
        "IDAdapterExtractFaces",
        image=image,
        analyzer=analyzer,
        select=select,
        index=index,
        on_missing=on_missing,
    )
    if clip_vision is not None:
        rewire(graph, faces, clip_vision=clip_vision)
    return faces


def add_adapter(graph: Graph, adapter: str = ADAPTER, text_branch: str = TEXT_BRANCH) -> Node:
    return graph.add("IDAdapterLoadAdapter", adapter=adapter, text_branch=text_branch)


def add_mix(
    graph: Graph, adapter: Node, faces: Node, *, mode: str = "auto", references: int = 0, weights: str = ""
) -> Node:
    return graph.add(
        "IDAdapterMixFeatures",
        adapter=adapter,
        faces=faces,
        mode=mode,
        references=references,
        weights=weights,
    )


def add_apply(graph: Graph, model: Node, adapter: Node, identity: Node, **inputs: Any) -> Node:
    values = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, **inputs}
    return graph.add("IDAdapterApply", model=model, adapter=adapter, identity=identity, **values)


def add_rescale(graph: Graph, model: Node, **inputs: Any) -> Node:
    return graph.add("IDAdapterRescale", model=model, **{**RESCALE, **inputs})


def add_prompt(
    graph: Graph, checkpoint: Node, identity: Node, text: str = "portrait photo of a <class word>"
) -> Node:
    return graph.add(
        "IDAdapterPrompt",
        clip=checkpoint[1],
        identity=identity,
        text=text,
        class_word="auto",
        token_weight=1.0,
    )


def add_attach(graph: Graph, prompt: Node, identity: Node) -> Node:
    """Add a prompt with its own identity."""
    return graph.add("IDAdapterAttach", conditioning=prompt, identity=identity, role="positive")


def add_text(graph: Graph, source: Node, slot: int) -> Node:
    """Show a STRING output, so that it is among the results of the run."""
    return graph.add("PreviewAny", source=source[slot])


def add_half_mask(graph: Graph, side: str, size: int = 64) -> Node:
    """Add a mask whose "left" or "right" half is 1."""
    black = graph.add("SolidMask", value=0.0, width=size, height=size)
    white = graph.add("SolidMask", value=1.0, width=size // 2, height=size)
    return graph.add(
        "MaskComposite",
        destination=black,
        source=white,
        x=0 if side == "left" else size // 2,
        y=0,
        operation="add",
    )


def rewire(graph: Graph, node: Node, **inputs: Node) -> None:
    """Connect some inputs of a node to other sources."""
    graph.workflow[node.id]["inputs"].update({name: source[0] for name, source in inputs.items()})


def uniid_graph(
    photos: Sequence[str] = (PERSON,),
    *,
    kind: str = "sdxl",
    adapter: str = ADAPTER,
    text_branch: str = TEXT_BRANCH,
    rescale: bool = True,
    weight: float = 1.0,
    id_prompt: bool = True,
    **text_to_image: Any,
) -> tuple[Graph, dict[str, Node]]:
    """Build the whole workflow, from photos to SaveImage. Returns it and its nodes by role.

    In addition to the roles of `add_text_to_image`: photos, analyzer, faces, adapter, identity, apply, and, if requested, rescale and
    prompt.
    """
    graph = Graph()
    nodes = add_text_to_image(graph, CHECKPOINT_NAMES[kind], **text_to_image)
    nodes["photos"] = add_photos(graph, photos)
    nodes["analyzer"] = add_analyzer(graph)
    nodes["faces"] = add_extract(graph, nodes["photos"], nodes["analyzer"])
    nodes["adapter"] = add_adapter(graph, adapter, text_branch)
    nodes["identity"] = add_mix(graph, nodes["adapter"], nodes["faces"])
    nodes["apply"] = add_apply(graph, nodes["checkpoint"], nodes["adapter"], nodes["identity"], weight=weight)
    model = nodes["apply"]
    if rescale:
        model = nodes["rescale"] = add_rescale(graph, model)
    rewire(graph, nodes["sampler"], model=model)
    if id_prompt:
        nodes["prompt"] = add_prompt(graph, nodes["checkpoint"], nodes["identity"])
        rewire(graph, nodes["sampler"], positive=nodes["prompt"])
    return graph, nodes
