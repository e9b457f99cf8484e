"""Checks a queued graph for missing nodes before it runs, and switches off what has no effect.

Without Apply ID Adapter no code of this pack runs during sampling, so a run cannot detect that the identity in its prompt has no
effect. The graph shows it each time it is queued, even if ComfyUI takes all nodes from its cache.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import messages
from .messages import Message, warning
from .off import OFF, is_marked
from .titles import APPLY, ATTACH, FACE_IDENTITY, PROMPT

FACE_IDENTITY_ID = "IDAdapterPersonalize"
ON_MODELS = ("IDAdapterApply", FACE_IDENTITY_ID)
IN_CONDITIONINGS = {"IDAdapterPrompt": PROMPT, "IDAdapterAttach": ATTACH, FACE_IDENTITY_ID: FACE_IDENTITY}
_ANY = "*"


@dataclass(frozen=True)
class Sockets:
    """The socket types of a node class."""

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


SocketsOf = Callable[[str], Sockets]  # node class id -> sockets


@dataclass(frozen=True)
class _Link:
    """The source of one node input."""

    source: str
    type: str


class Graph:
    """A queued prompt: node id -> {class_type, inputs}."""

    def __init__(self, prompt: Mapping[str, Any], sockets_of: SocketsOf):
        self.classes: dict[str, str] = {}
        self.off: set[str] = set()
        self.links: dict[str, list[_Link]] = {}
        nodes = {str(number): node for number, node in prompt.items() if isinstance(node, Mapping)}
        for number, node in nodes.items():
            self.classes[number] = str(node.get("class_type", ""))
            if is_marked(node):
                self.off.add(number)
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
        # The output of a switch or reroute can be of any type; then the type of the input counts.
        return _Link(source, given[slot] if known and given[slot] != _ANY else taken)

    def sources(self, node: str, kind: str) -> set[str]:
        """Return all direct and indirect sources of a node's inputs of one socket type."""
        found: set[str] = set()
        waiting = [link.source for link in self.links[node] if link.type == kind]
        while waiting:
            source = waiting.pop()
            if source not in found:
                found.add(source)
                waiting += [link.source for link in self.links[source] if link.type in (kind, _ANY)]
        return found

    def is_off(self, node: str) -> bool:
        return node in self.off

    def meeting_places(self) -> Iterator[str]:
        """Yield the nodes that take both a model and a conditioning: samplers, guiders, pipes."""
        for node, links in self.links.items():
            if {"MODEL", "CONDITIONING"} <= {link.type for link in links}:
                yield node


def without_effect(prompt: Mapping[str, Any], sockets_of: SocketsOf) -> set[str]:
    """Return the nodes to switch off because those they belong to are missing or off, so that the picture is that of the plain model.

    A prompt without an adapter on the model that it samples with would still have the identity's tokens in it; an adapter on a model all of
    whose prompts are switched off would still act.
    """
    graph = Graph(prompt, sockets_of)
    acting: dict[
        str, list[bool]
    ] = {}  # by prompt: for each place where it is used, whether an adapter acts there
    asked: dict[
        str, list[bool]
    ] = {}  # by adapter: for each place where it is used, whether a prompt asks for it
    for place in graph.meeting_places():
        models = {node for node in graph.sources(place, "MODEL") if graph.classes[node] in ON_MODELS}
        prompts = {
            node for node in graph.sources(place, "CONDITIONING") if graph.classes[node] in IN_CONDITIONINGS
        }
        has_adapter = any(not graph.is_off(node) for node in models)
        is_asked = not prompts or any(not graph.is_off(node) for node in prompts)
        for node in prompts:
            acting.setdefault(node, []).append(has_adapter)
        for node in models:
            asked.setdefault(node, []).append(is_asked)
    return {node for uses in (acting, asked) for node, found in uses.items() if not any(found)}


def omissions(prompt: Mapping[str, Any], sockets_of: SocketsOf) -> dict[str, list[Message]]:
    """Return the messages for each node that puts an identity into conditionings; an empty list if nothing is missing."""
    graph = Graph(prompt, sockets_of)
    applied: dict[str, bool] = {}  # by node: whether it meets an adapter
    for place in graph.meeting_places():
        has_adapter = any(graph.classes[node] in ON_MODELS for node in graph.sources(place, "MODEL"))
        for node in graph.sources(place, "CONDITIONING"):
            applied[node] = applied.get(node, False) or has_adapter
    anywhere = any(kind in ON_MODELS for kind in graph.classes.values())
    consumed = {link.source for links in graph.links.values() for link in links}
    found: dict[str, list[Message]] = {}
    for node, kind in graph.classes.items():
        if kind in IN_CONDITIONINGS:
            missing = node in consumed and not graph.is_off(node) and not applied.get(node, anywhere)
            text = _MODEL_UNUSED if kind == FACE_IDENTITY_ID else _WITHOUT_APPLY
            found[node] = [warning(text)] if missing else []
    return found


def on_prompt(data: Any) -> Any:
    """Handler that ComfyUI calls with every queued prompt, before validating it."""
    prompt = data.get("prompt") if isinstance(data, Mapping) else None
    if isinstance(prompt, Mapping):
        sockets_of = functools.cache(_sockets_of)
        for node, found in omissions(prompt, sockets_of).items():
            title = IN_CONDITIONINGS[str(prompt[node]["class_type"])]
            messages.show(node, title, "graph", found, data.get("client_id"))
        for node in without_effect(prompt, sockets_of):
            prompt[node]["inputs"][OFF] = True
    return data


def _sockets_of(name: str) -> Sockets:
    # Imported by name, because a type checker takes `nodes` for this folder.
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
    """Normalise a declared socket type: lists are combos, and a matching type can be anything."""
    named = declared if isinstance(declared, str) else "COMBO"
    return _ANY if named.startswith("COMFY_MATCHTYPE") else named


def register() -> None:
    """Register `on_prompt` with ComfyUI's server, if there is one."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(on_prompt)


_WITHOUT_APPLY = (
    f"no {APPLY} is on the model that samples with this prompt, so the picture will not show the person. Put it between the model's "
    "loader and the sampler, with the same identity."
)
_MODEL_UNUSED = (
    "the model that samples with this prompt does not come from this node, so the picture will not show the person. Wire this node's `model` "
    "to the sampler."
)
