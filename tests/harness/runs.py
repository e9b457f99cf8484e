"""The course of one workflow on a server, from its websocket and history."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from PIL import Image


@dataclass(frozen=True)
class NodeFailure:
    """An exception in a node, as the server reports it to the user."""

    node_id: str
    node_type: str
    exception_type: str
    message: str
    traceback: str


@dataclass
class RunResult:
    """Result of one workflow."""

    prompt_id: str = ""
    """Empty if the server refused the workflow."""
    rejection: str = ""
    """The server's reason for refusing the whole workflow; empty if it did not."""
    node_errors: dict[str, list[str]] = field(default_factory=dict)
    """Validation errors by node id. The server may still run the valid outputs of the workflow."""
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Every message about this run, in order: (type, data)."""
    executed_nodes: list[str] = field(default_factory=list)
    """Ids of the executed nodes, in order, without those served from the cache."""
    cached_nodes: list[str] = field(default_factory=list)
    error: NodeFailure | None = None
    interrupted: bool = False
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """UI output of each output node by id, from the server's history: `{"9": {"images": [...]}}`."""
    images_by_node: dict[str, list[Image.Image]] = field(default_factory=dict)
    told: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    """Final texts shown by the pack's nodes, except their reports, by node id and topic."""
    log: str = ""
    """The server's log during the run."""
    seconds: float = 0.0

    @property
    def images(self) -> list[Image.Image]:
        """All images of nodes that save or preview images, without the previews of the pack's own nodes."""
        return [
            image
            for node, images in self.images_by_node.items()
            if "idadapter" not in self.outputs[node]
            for image in images
        ]

    @property
    def ok(self) -> bool:
        return not (self.rejection or self.node_errors or self.error or self.interrupted)

    def check(self) -> RunResult:
        """Return this result if the run succeeded.

        Raises:
            AssertionError: it failed; the message contains the server's messages.
        """
        if not self.ok:
            raise AssertionError(self.describe())
        return self

    def describe(self) -> str:
        """Describe the failure; "ok" if there is none."""
        parts = [self.rejection] if self.rejection else []
        parts += [f"node {node}: {'; '.join(errors)}" for node, errors in self.node_errors.items()]
        if self.error:
            parts.append(
                f"node {self.error.node_id} ({self.error.node_type}): {self.error.exception_type}: "
                f"{self.error.message}\n{self.error.traceback}"
            )
        if self.interrupted:
            parts.append("interrupted")
        return "\n".join(parts) or "ok"


def read_validation(result: RunResult, answer: dict[str, Any]) -> None:
    result.prompt_id = answer.get("prompt_id", "")
    error = answer.get("error")
    if error:
        result.rejection = _one_line(error)
    # The server sends an empty list instead of a dict if there are no errors.
    for node, report in (answer.get("node_errors") or {}).items():
        result.node_errors[node] = [_one_line(entry) for entry in report["errors"]]


def _one_line(error: dict[str, Any]) -> str:
    details = f": {error['details']}" if error.get("details") else ""
    return f"{error['type']}: {error['message']}{details}"


async def follow(
    socket: aiohttp.ClientWebSocketResponse,
    result: RunResult,
    on_message: Callable[[str, dict[str, Any]], None] | None,
) -> None:
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue  # previews are binary messages
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if kind == "idadapter.messages":
            texts = tuple(message["text"] for message in data["messages"])
            result.told[data["node"], data["topic"]] = texts
        if data.get("prompt_id") != result.prompt_id:
            continue
        result.messages.append((kind, data))
        if on_message:
            on_message(kind, data)
        if kind == "executing":
            # The only message sent after the history was written.
            if data["node"] is None:
                return
            result.executed_nodes.append(data["node"])
        elif kind == "execution_cached":
            result.cached_nodes = list(data["nodes"])
        elif kind == "execution_interrupted":
            result.interrupted = True
        elif kind == "execution_error":
            result.error = NodeFailure(
                node_id=data["node_id"],
                node_type=data["node_type"],
                exception_type=data["exception_type"],
                message=data["exception_message"].strip(),
                traceback="".join(data["traceback"]),
            )
    raise ConnectionError("the server closed the websocket")


async def collect(session: aiohttp.ClientSession, result: RunResult) -> None:
    async with session.get(f"/history/{result.prompt_id}", raise_for_status=True) as response:
        result.outputs = (await response.json())[result.prompt_id]["outputs"]
    for node, output in result.outputs.items():
        for entry in output.get("images", []):
            async with session.get("/view", params=entry, raise_for_status=True) as response:
                image = Image.open(io.BytesIO(await response.read()))
                image.load()
            result.images_by_node.setdefault(node, []).append(image)
