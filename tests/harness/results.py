"""Read the results of a run: images as arrays, and texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.harness.runs import RunResult
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import rewire
from tests.harness.workflow import Graph, Node


def picture(result: RunResult) -> np.ndarray:
    """The only saved image of a run, (H, W, 3)."""
    (image,) = result.check().images
    assert image.format == "PNG"
    return np.asarray(image, dtype=np.int16)


def pictures(result: RunResult) -> list[np.ndarray]:
    return [np.asarray(image, dtype=np.int16) for image in result.check().images]


def text_of(result: RunResult, node: str) -> str:
    """The text shown by a `PreviewAny` node."""
    return "".join(result.outputs[node]["text"])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two images, in levels of 255."""
    return float(np.abs(one - other).mean())


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of two images, in levels of 255."""
    return int(np.abs(one - other).max())


def picture_halves(
    server: ComfyServer, graph: Graph, nodes: dict[str, Node], prompts: Sequence[Node]
) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of a 128 x 128 image with a separate prompt for each, each half decoded separately."""
    regions = [
        graph.add("ConditioningSetArea", conditioning=prompt, width=64, height=128, x=x, y=0, strength=1.0)
        for prompt, x in zip(prompts, (0, 64), strict=True)
    ]
    both = graph.add("ConditioningCombine", conditioning_1=regions[0], conditioning_2=regions[1])
    rewire(graph, nodes["sampler"], positive=both)
    saved = []
    for x in (0, 64):
        latent = graph.add("LatentCrop", samples=nodes["sampler"], width=64, height=128, x=x, y=0)
        decoded = graph.add("VAEDecode", samples=latent, vae=nodes["checkpoint"][2])
        saved.append(graph.add("SaveImage", images=decoded, filename_prefix="half"))
    result = server.run(graph.workflow).check()
    one, other = (np.asarray(result.images_by_node[node.id][0], dtype=np.int16) for node in saved)
    return one, other
