"""Nodes that are switched off: they run, and do nothing.

ComfyUI takes a bypassed node out of the graph, which breaks a graph where the node's output has no input of its type to stand for it.
`web/js/bypass.js` therefore sends a bypassed node of this pack with a mark, and `graph` marks those that have no effect without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OFF = "off"  # among the inputs of a queued node


def is_marked(node: Mapping[str, Any]) -> bool:
    """Return whether a node of a queued prompt, {class_type, inputs}, is switched off."""
    inputs = node.get("inputs")
    return isinstance(inputs, Mapping) and inputs.get(OFF) is True


def is_off(hidden: Any) -> bool:
    """Return whether the running node is switched off.

    Args:
        hidden: holder of its hidden inputs, with `dynprompt` and `unique_id`; None outside a prompt.
    """
    prompt = getattr(hidden, "dynprompt", None)
    return prompt is not None and is_marked(prompt.get_node(hidden.unique_id))
