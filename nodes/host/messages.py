"""Messages to the user, shown on the node they concern.

A node's own report is part of its result (`report_ui`), so that ComfyUI caches it with the result and sends it again. Messages from
any other time, while another node samples or before anything runs, are sent as events (`show`). `web/js` draws both on the node;
warnings are also logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from functools import wraps
from typing import Any, Literal, TypeVar

from comfy_api.latest import io

from ...idadapter_core.types import Remark

_Node = TypeVar("_Node", bound=io.ComfyNode)

log = logging.getLogger(__name__)
EVENT = "idadapter.messages"
REPORT_KEY = "idadapter"  # in a node's UI output
MOST_SHOWN = 12  # maximum remarks on a node

Level = Literal["info", "warning"]
# When it was found: queueing the graph, starting a sampling run, or ending it.
Topic = Literal["graph", "run", "result"]


class Client(Enum):
    """A frontend that receives messages, other than by its id."""

    RUNNING = "the one that queued the running prompt"


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
    """Return ComfyUI's id of the executing node class (hidden input `unique_id`), or None outside a prompt."""
    found: str | None = getattr(getattr(node, "hidden", None), "unique_id", None)
    return found


def message_of(remark: Remark) -> Message:
    """Convert a remark of the core to a message."""
    return Message("warning" if remark.is_warning else "info", remark.text)


def from_remarks(remarks: Iterable[Remark]) -> list[Message]:
    """Convert remarks of the core to messages. Of many (a video), 12 are kept: the first, then warnings before others."""
    remarks = tuple(remarks)
    ranked = sorted(range(len(remarks)), key=lambda i: (i > 0 and not remarks[i].is_warning, i))
    shown = [remarks[i] for i in sorted(ranked[:MOST_SHOWN])]
    messages = list(map(message_of, shown))
    if len(remarks) > MOST_SHOWN:
        messages.append(info(f"… and {len(remarks) - MOST_SHOWN} more, in the report output."))
    return messages


def report_ui(messages: Iterable[Message], title: str | None = None) -> dict[str, list[Any]]:
    """Return the UI output that holds a node's report.

    Args:
        title: display name of the node for logging its warnings; None if they are logged elsewhere.
    """
    messages = tuple(messages)
    if title is not None:
        _log_warnings(title, messages)
    return {REPORT_KEY: [asdict(message) for message in messages]}


def keeps_report(define_schema: Callable[[type[_Node]], io.Schema]) -> Callable[[type[_Node]], io.Schema]:
    """Decorate a node's `define_schema` so that ComfyUI resends the report of a cached result with every run, even after a page
    reload. Older releases ignore the flag."""

    @wraps(define_schema)
    def marked(node: type[_Node]) -> io.Schema:
        schema = define_schema(node)
        schema.has_intermediate_output = True
        return schema

    return marked


def show(
    node_id: str | None,
    title: str,
    topic: Topic,
    messages: Iterable[Message],
    client: str | Literal[Client.RUNNING] | None = Client.RUNNING,
) -> None:
    """Show messages on a node, replacing its previous ones on this topic. An empty list clears them.

    Args:
        node_id: ComfyUI's id of the node in the running prompt; None outside a prompt, where messages are only logged.
        title: display name of the node, for the log.
        client: id of the frontend that queued the prompt, for a prompt that is not running yet; None if a program queued it.
            Default: the client of the running prompt.
    """
    messages = tuple(messages)
    _log_warnings(title, messages)
    if node_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    is_running = client is Client.RUNNING
    receiver = server.client_id if is_running else client
    if receiver is None:
        return  # queued by a program: without a receiver the event would reach every open browser
    prompt = getattr(server, "last_prompt_id", None) if is_running else None
    data = {
        "node": node_id,
        "topic": topic,
        "messages": [asdict(message) for message in messages],
        "prompt_id": prompt,  # identifies the workflow in the frontend
    }
    server.send_sync(EVENT, data, receiver)


def _log_warnings(title: str, messages: Iterable[Message]) -> None:
    for message in messages:
        if message.level == "warning":
            log.warning("%s: %s", title, message.text)
