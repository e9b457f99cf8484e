"""Graphs in the server's API format: node id to class and inputs, links as [node id, output slot]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Workflow = dict[str, dict[str, Any]]
Link = list[Any]
_CONTROLS = ("fixed", "increment", "decrement", "randomize")  # after a number: how it changes from run to run
_NOTES = ("Note", "MarkdownNote")


def api_workflow(saved: Mapping[str, Any]) -> Workflow:
    """Convert a workflow as the frontend saves it to the API format, as the Run button does.

    Every node must be active, and every widget named among the inputs. Files of older frontends, and nodes that upload files, are not
    converted.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    prompt: Workflow = {}
    for node in saved["nodes"]:
        if node["type"] in _NOTES:
            continue
        values = list(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        for entry in node["inputs"]:
            if "widget" in entry:
                value = values.pop(0)
                if entry["type"] == "INT" and values and values[0] in _CONTROLS:
                    values.pop(0)
                inputs[entry["name"]] = value
            if entry["link"] is not None:
                inputs[entry["name"]] = links[entry["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


class Node:
    """A node of a `Graph`. `node[1]` is a link to its second output, for use as another node's input."""

    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def __getitem__(self, slot: int) -> Link:
        return [self.id, slot]


class Graph:
    """Builds a workflow node by node; `graph.workflow` is the input of `ComfyServer.run`.

    >>> graph = Graph()
    >>> checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name="tiny_sdxl.safetensors")
    >>> text = graph.add("CLIPTextEncode", clip=checkpoint[1], text="a photo")
    """

    def __init__(self) -> None:
        self.workflow: Workflow = {}

    def add(self, class_type: str, /, extra: Mapping[str, Any] | None = None, **inputs: Any) -> Node:
        """Add a node. `extra` takes inputs whose names are not valid in Python ("images.image0").

        A `Node` given as an input stands for its first output.
        """
        node_id = str(len(self.workflow) + 1)
        given = {**inputs, **(extra or {})}
        self.workflow[node_id] = {
            "class_type": class_type,
            "inputs": {name: value[0] if isinstance(value, Node) else value for name, value in given.items()},
        }
        return Node(node_id)


def add_text_to_image(
    graph: Graph,
    checkpoint: str,
    *,
    prompt: str = "a photo of a woman in a park",
    negative: str = "blurry",
    size: int = 64,
    batch: int = 1,
    steps: int = 4,
    cfg: float = 7.0,
    seed: int = 1,
) -> dict[str, Node]:
    """Add the standard text-to-image graph. Returns its nodes by role.

    The roles are checkpoint, positive, negative, latent, sampler, decoder and save. To patch the MODEL, add the nodes
    and then `graph.workflow[nodes["sampler"].id]["inputs"]["model"] = patched[0]`.
    """
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    positive = graph.add("CLIPTextEncode", clip=loader[1], text=prompt)
    uncond = graph.add("CLIPTextEncode", clip=loader[1], text=negative)
    latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=batch)
    sampler = graph.add(
        "KSampler",
        model=loader,
        positive=positive,
        negative=uncond,
        latent_image=latent,
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    decoder = graph.add("VAEDecode", samples=sampler, vae=loader[2])
    save = graph.add("SaveImage", images=decoder, filename_prefix="test")
    return {
        "checkpoint": loader,
        "positive": positive,
        "negative": uncond,
        "latent": latent,
        "sampler": sampler,
        "decoder": decoder,
        "save": save,
    }
