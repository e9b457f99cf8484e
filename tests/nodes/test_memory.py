"""What is found again instead of being loaded or looked for again, and how long it is kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch


class Thing:
    """Something that can be loaded, or be used as a tool."""


def live() -> Any:
    from ComfyUI_IDAdapter.nodes.host.memory import Live

    return Live()


def recent() -> Any:
    from ComfyUI_IDAdapter.nodes.host.memory import Recent

    return Recent()


def test_a_file_that_is_in_use_is_not_loaded_again() -> None:
    loads = live()
    first = loads.get("stamp", Thing)
    assert loads.get("stamp", Thing) is first
    assert loads.get("another stamp", Thing) is not first


def test_a_file_that_nothing_uses_is_let_go() -> None:
    loads = live()
    loaded = weakref.ref(loads.get("stamp", Thing))
    gc.collect()
    assert loaded() is None


def test_what_is_handed_over_waits_for_the_node_that_takes_it() -> None:
    loads = live()
    loaded = weakref.ref(loads.get("stamp", Thing, hand_over=True))
    gc.collect()
    assert loaded() is not None
    taken = loads.get("stamp", Thing)
    assert taken is loaded()
    del taken
    gc.collect()
    assert loaded() is None, "only the taker keeps it"


def test_a_result_is_found_again_for_the_same_things_only() -> None:
    results, tensor, other, tool = recent(), torch.zeros(2), torch.zeros(2), Thing()
    first = results.get(tensor, [other], "settings", Thing, tool)
    assert results.get(tensor, [other], "settings", Thing, tool) is first
    for change in (
        (torch.zeros(2), [other], "settings", tool),
        (tensor, [torch.zeros(2)], "settings", tool),
        (tensor, [], "settings", tool),
        (tensor, [other], "others", tool),
        (tensor, [other], "settings", Thing()),
    ):
        things, tools = change[:3], change[3]
        assert results.get(*things, Thing, tools) is not first
        first = results.get(tensor, [other], "settings", Thing, tool)


def test_a_result_lives_as_long_as_its_tensor() -> None:
    results, tensor, tool = recent(), torch.zeros(2), Thing()
    result, its_tool = weakref.ref(results.get(tensor, [], 0, Thing, tool)), weakref.ref(tool)
    del tool
    gc.collect()
    assert result() is not None
    assert its_tool() is not None
    del tensor
    gc.collect()
    assert result() is None
    assert its_tool() is None


def test_other_objects_are_not_kept() -> None:
    results, tensor, other = recent(), torch.zeros(2), torch.zeros(2)
    results.get(tensor, [other], 0, Thing)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
