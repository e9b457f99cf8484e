"""What a queued graph leaves out, told before anything runs.

Without Apply ID Adapter nothing of this pack takes part in sampling, so the run itself cannot tell that an identity in a prompt goes
nowhere. The graph can, at every queue, also where ComfyUI takes all nodes from its cache.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import messages
from .messages import Message, warning
from .titles import APPLY, ATTACH, PROMPT

APPLY_ID = "IDAdapterApply"
IN_CONDITIONINGS = {"IDAdapterPrompt": PROMPT, "IDAdapterAttach": ATTACH}
_ANY = "*"


@dataclass(frozen=True)
class Sockets:
    """The socket types of a node class."""

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


SocketsOf = Callable[[str], Sockets]  # by the id of a node class


@dataclass(frozen=True)
class _Link:
    """What one input of a node is wired to."""

    source: str
    type: str


class Graph:
    """A prompt as it is queued: node id -> {class_type, inputs}."""

    def __init__(self, prompt: Mapping[str, Any], sockets_of: SocketsOf):
        self.classes: dict[str, str] = {}
        self.links: dict[str, list[_Link]] = {}
        nodes = {str(number): node for number, node in prompt.items() if isinstance(node, Mapping)}
        for number, node in nodes.items():
            self.classes[number] = str(node.get("class_type", ""))
        for number, node in nodes.items():
            inputs = node.get("inputs")
            values = inputs.items() if isinstance(inputs, Mapping) else ()
            taken = sockets_of(self.classes[number]).inputs
            links = (self._link(value, taken.get(name, _ANY), sockets_of) for name, value in values)
            self.links[number] = [link for link in links if link is not None]

    def _link(self, value: Any, taken: str, sockets_of: SocketsOf) -> _Link | None:
        if not isinstance(value, list) or len(value) != 2 or str(value[0]) not in self.classes:
            return None
        source, slot = str(value[0]), value[1]
        given = sockets_of(self.classes[source]).outputs
        known = isinstance(slot, int) and 0 <= slot < len(given)
        # A switch or reroute gives anything; then the input says what it is.
        return _Link(source, given[slot] if known and given[slot] != _ANY else taken)

    def sources(self, node: str, kind: str) -> set[str]:
        """All nodes that a node's inputs of one socket type come from, through however many others."""
        found: set[str] = set()
        waiting = [link.source for link in self.links[node] if link.type == kind]
        while waiting:
            source = waiting.pop()
            if source not in found:
                found.add(source)
                waiting += [link.source for link in self.links[source] if link.type in (kind, _ANY)]
        return found

    def meeting_places(self) -> Iterator[str]:
        """Nodes that take both a model and a conditioning: samplers, guiders, pipes."""
        for node, links in self.links.items():
            if {"MODEL", "CONDITIONING"} <= {link.type for link in links}:
                yield node


def omissions(prompt: Mapping[str, Any], sockets_of: SocketsOf) -> dict[str, list[Message]]:
    """Messages for each node of a prompt that puts an identity into conditionings; none where nothing is missing."""
    graph = Graph(prompt, sockets_of)
    applied: dict[str, bool] = {}  # by node: whether a model with an adapter meets its conditioning anywhere
    for place in graph.meeting_places():
        has_adapter = any(graph.classes[node] == APPLY_ID for node in graph.sources(place, "MODEL"))
        for node in graph.sources(place, "CONDITIONING"):
            applied[node] = applied.get(node, False) or has_adapter
    anywhere = APPLY_ID in graph.classes.values()
    consumed = {link.source for links in graph.links.values() for link in links}
    found: dict[str, list[Message]] = {}
    for node, kind in graph.classes.items():
        if kind in IN_CONDITIONINGS:
            missing = node in consumed and not applied.get(node, anywhere)
            found[node] = [warning(_WITHOUT_APPLY)] if missing else []
    return found


def on_prompt(data: Any) -> Any:
    """ComfyUI calls this with every prompt that is queued, before it looks at it."""
    prompt = data.get("prompt") if isinstance(data, Mapping) else None
    if isinstance(prompt, Mapping):
        for node, found in omissions(prompt, functools.cache(_sockets_of)).items():
            title = IN_CONDITIONINGS[str(prompt[node]["class_type"])]
            messages.say(node, title, "graph", found, data.get("client_id"))
    return data


def _sockets_of(name: str) -> Sockets:
    # By name: for a type checker `nodes` is this folder.
    node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS.get(name)
    if node is None:
        return Sockets({}, ())
    declared = node.INPUT_TYPES()
    inputs = {
        str(key): _type(options[0])
        for part in ("required", "optional")
        for key, options in declared.get(part, {}).items()
        if isinstance(options, (tuple, list)) and options
    }
    return Sockets(inputs, tuple(map(_type, getattr(node, "RETURN_TYPES", ()))))


def _type(declared: Any) -> str:
    """A socket type as nodes declare it; lists are choices, and matching types are decided by the other end."""
    named = declared if isinstance(declared, str) else "COMBO"
    return _ANY if named.startswith("COMFY_MATCHTYPE") else named


def listen() -> None:
    """Have ComfyUI's server show every prompt to `on_prompt`, where there is a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(on_prompt)


_WITHOUT_APPLY = (
    f"no {APPLY} is on the model that samples with this prompt, so the picture will not show the person. Put it between the model's "
    "loader and the sampler, with the same identity."
)
