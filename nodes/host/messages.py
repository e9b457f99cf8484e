"""What the pack says to the user, on the node it is about.

A node's own report goes out with its result (`report_ui`), so that ComfyUI keeps it with the cached result and sends it again.
What turns out later, while another node samples or before anything runs, goes out as an event (`say`). `web/js` draws both on the
node; warnings are also logged.
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
MOST_SHOWN = 12  # remarks on a node

Level = Literal["info", "warning"]
# Found when the graph was queued; when a sampling run began; when it had ended.
Topic = Literal["graph", "run", "result"]


class Whose(Enum):
    """Whose frontend a message is for."""

    RUNNING = "that of the prompt that runs"


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


def from_remarks(remarks: Iterable[Remark]) -> list[Message]:
    """What the core remarked, as messages. Of very many, as a video has them, 12 are left: the first, and warnings before others."""
    remarks = tuple(remarks)
    ranked = sorted(range(len(remarks)), key=lambda i: (i > 0 and not remarks[i].is_warning, i))
    shown = [remarks[i] for i in sorted(ranked[:MOST_SHOWN])]
    messages = [Message("warning" if remark.is_warning else "info", remark.text) for remark in shown]
    if len(remarks) > MOST_SHOWN:
        messages.append(info(f"… and {len(remarks) - MOST_SHOWN} more, in the report output."))
    return messages


def report_ui(messages: Iterable[Message], title: str | None = None) -> dict[str, list[Any]]:
    """The part of a node's UI output that holds its report.

    Args:
        title: display name of the node, under which its warnings are logged; None where they are logged elsewhere.
    """
    messages = tuple(messages)
    if title is not None:
        _log_warnings(title, messages)
    return {REPORT_KEY: [asdict(message) for message in messages]}


def keeps_report(define_schema: Callable[[type[_Node]], io.Schema]) -> Callable[[type[_Node]], io.Schema]:
    """Decorates a node's `define_schema`: ComfyUI sends the report of a cached result again with every run, also after the page
    was loaded anew. Older releases know no such mark and are not disturbed by it."""

    @wraps(define_schema)
    def marked(node: type[_Node]) -> io.Schema:
        schema = define_schema(node)
        schema.has_intermediate_output = True
        return schema

    return marked


def say(
    node_id: str | None,
    title: str,
    topic: Topic,
    messages: Iterable[Message],
    client: str | Literal[Whose.RUNNING] | None = Whose.RUNNING,
) -> None:
    """Show messages on a node in place of those it showed on this topic; none clears them.

    Args:
        node_id: ComfyUI's id of the node in the running prompt; None outside a prompt, where messages are only logged.
        title: display name of the node, for the log.
        client: the frontend that queued the prompt, where it does not run yet, or None where a program queued it; that of the
            running prompt by default.
    """
    messages = tuple(messages)
    _log_warnings(title, messages)
    if node_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    is_running = client is Whose.RUNNING
    receiver = server.client_id if is_running else client
    if receiver is None:
        return  # queued by a program: sent to nobody in particular, it would reach every open browser
    prompt = getattr(server, "last_prompt_id", None) if is_running else None
    data = {
        "node": node_id,
        "topic": topic,
        "messages": [asdict(message) for message in messages],
        "prompt_id": prompt,  # tells the frontend which of its workflows this is about
    }
    server.send_sync(EVENT, data, receiver)


def _log_warnings(title: str, messages: Iterable[Message]) -> None:
    for message in messages:
        if message.level == "warning":
            log.warning("%s: %s", title, message.text)
