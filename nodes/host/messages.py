"""What the pack says to the user, on the node it is about.

A node's own report goes out with its result (`report_ui`), so that ComfyUI keeps it with the cached result and sends it again.
What turns out later, while another node samples or before anything runs, goes out as an event (`say`). `web/js` draws both on the
node; warnings are also logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

log = logging.getLogger(__name__)
EVENT = "idadapter.messages"
REPORT_KEY = "idadapter"  # in a node's UI output

Level = Literal["info", "warning"]
# Found when the graph was queued; when a sampling run began; when it had ended.
Topic = Literal["graph", "run", "result"]


@dataclass(frozen=True)
class Message:
    """One sentence on a node."""

    level: Level
    text: str


def info(text: str) -> Message:
    return Message("info", text)


def warning(text: str) -> Message:
    return Message("warning", text)


def node_id_of(node: Any) -> str | None:
    """ComfyUI's id of the node class that executes (its schema hides `unique_id`); None outside a prompt."""
    found: str | None = getattr(getattr(node, "hidden", None), "unique_id", None)
    return found


def report(title: str, messages: Iterable[Message]) -> dict[str, list[Any]]:
    """`report_ui` of a node that executes now; its warnings are logged."""
    messages = tuple(messages)
    _log(title, messages)
    return report_ui(messages)


def report_ui(messages: Iterable[Message]) -> dict[str, list[Any]]:
    """The part of a node's UI output that holds its report."""
    return {REPORT_KEY: [asdict(message) for message in messages]}


def say(
    node_id: str | None, title: str, topic: Topic, messages: Iterable[Message], client: str | None = None
) -> None:
    """Show messages on a node in place of those it showed on this topic; none clears them.

    Args:
        node_id: ComfyUI's id of the node in the running prompt; None outside a prompt, where messages are only logged.
        title: display name of the node, for the log.
        client: the frontend that queued the prompt; the one whose prompt runs by default.
    """
    messages = tuple(messages)
    _log(title, messages)
    if node_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    client = client or getattr(server, "client_id", None)
    if server is not None and client is not None:  # without a client the event would go to all of them
        data = {"node": node_id, "topic": topic, "messages": [asdict(message) for message in messages]}
        server.send_sync(EVENT, data, client)


def _log(title: str, messages: Iterable[Message]) -> None:
    for message in messages:
        if message.level == "warning":
            log.warning("%s: %s", title, message.text)
