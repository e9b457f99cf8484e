"""Every number input of every node refuses numbers that it cannot use, wherever they come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.harness.comfy import pack_nodes

NAN, INFINITY = math.nan, math.inf


def number_inputs() -> list[tuple[Any, Any, Any]]:
    """Node, schema and input of all number inputs that there are, so that a new one is tested by itself."""
    from comfy_api.latest import io

    return [
        (node, schema, entry)
        for node in pack_nodes().values()
        for schema in [node.define_schema()]
        for entry in schema.inputs
        if isinstance(entry, io.Float.Input | io.Int.Input)
    ]


def test_a_number_that_cannot_be_used_is_refused_by_name() -> None:
    from comfy_api.latest import io

    names = set()
    for node, schema, entry in number_inputs():
        names.add((schema.node_id, entry.id))
        unusable = [NAN, INFINITY, -INFINITY, 10**400, -(10**400), np.float32("nan"), "0.5", [1], None]
        if isinstance(entry, io.Int.Input):
            unusable += [entry.max + 1, entry.min - 1, 0.5]
        for value in unusable:
            # Nothing else is given: the numbers come first, before any work.
            with pytest.raises(Exception, match="must be a") as refused:
                node.execute(**{entry.id: value})
            assert type(refused.value).__name__ == "InputError"
            message = str(refused.value)
            assert message.startswith(f"{schema.display_name}: {entry.id} must be a")
            assert f"Enter a number from {entry.min:g} to {entry.max:g}" in message
            assert str(value)[:30] in message
            assert "repair the node that is wired to it" in message
            assert len(message) < 300
    assert {("IDAdapterApply", "weight"), ("IDAdapterExtractFaces", "index")} <= names


def test_other_numbers_are_taken() -> None:
    """Floats beyond the widget's range, too: from another node they mean what they say."""
    from comfy_api.latest import io

    for node, _, entry in number_inputs():
        beyond = [] if isinstance(entry, io.Int.Input) else [entry.max + 1, entry.min - 1, np.float32(0.5), 1]
        for value in (entry.min, entry.max, entry.default, *beyond):
            with pytest.raises(TypeError, match="missing"):  # the other inputs: the number was taken
                node.execute(**{entry.id: value})


@pytest.mark.parametrize("text", ["nan", "1, nan", "inf", "1 -inf", "1e999", "1, 2, NaN"])
def test_numbers_in_a_text(text: str) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError
    from ComfyUI_IDAdapter.idadapter_core.types import Mix
    from ComfyUI_IDAdapter.nodes.identity import parse_weights

    with pytest.raises(InputError, match="weights must be finite numbers"):
        Mix(weights=parse_weights(text))
