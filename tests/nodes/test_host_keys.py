"""Other nodes run blocks, model calls and samplers of their own, and pass on only what they need themselves.

Reference ControlNet (Advanced-ControlNet) and AnimateDiff's ContextRef copy a transformer block and leave `attn_precision` out;
the next such node will leave out something else. Only the number of heads cannot be done without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes import idadapter_sampling
from tests.nodes.idadapter_sampling import Made
from tests.nodes.sampling import apply, difference, draw, left_half, person, rescale, unet

ALWAYS = {"n_heads"}
Passed = Callable[[dict[str, Any]], dict[str, Any]]


def in_blocks(model: Any, passed: Passed) -> Any:
    """A clone whose patches inside of blocks are given only what `passed` leaves of the block's options."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = dict(args[5])
        replaced = options.get("patches_replace", {})
        options["patches_replace"] = {
            name: {key: last_argument(patch, passed) for key, patch in slots.items()}
            for name, slots in replaced.items()
        }
        options["patches"] = {
            name: [last_argument(patch, passed) for patch in some]
            for name, some in options.get("patches", {}).items()
        }
        return executor(*args[:5], options, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone


def last_argument(patch: Any, passed: Passed) -> Any:
    return lambda *args: patch(*args[:-1], passed(args[-1]))


def around_calls(model: Any, passed: Passed) -> Any:
    """A clone whose model calls are given only what `passed` leaves of the transformer options."""
    from comfy.patcher_extension import WrappersMP

    def with_rows(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        *between, options = args
        return executor(x, t, *between, passed(options), **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", with_rows)
    return clone


def without(key: str) -> Passed:
    return lambda options: {name: value for name, value in options.items() if name != key}


def keys_seen(through: Callable[[Any, Passed], Any], model: Any, kind: str) -> set[str]:
    seen: set[str] = set()

    def note(options: dict[str, Any]) -> dict[str, Any]:
        seen.update(options)
        return options

    draw(through(model, note), kind)
    assert {"sigmas", "cond_or_uncond", "uuids"} <= seen
    return seen


def uniid(model: Any) -> Any:
    return rescale(apply(model, "sd15", person("sd15"), mask=left_half()), adapter_late=0.8)


def idadapter(model: Any) -> Any:
    made = Made("sd15")
    applied = idadapter_sampling.apply(model, made, idadapter_sampling.person(made), mask=left_half())
    return rescale(applied, gated=True)


METHODS = pytest.mark.parametrize("method", [uniid, idadapter])


@METHODS
def test_any_key_of_a_block_may_be_missing(method: Callable[[Any], Any]) -> None:
    model = method(unet("sd15"))
    want = draw(model, "sd15")
    keys = keys_seen(in_blocks, model, "sd15")
    assert {"n_heads", "attn_precision", "activations_shape", "block", "block_index"} <= keys
    for key in sorted(keys - ALWAYS):
        if method is idadapter and key == "block":
            continue  # see below
        assert torch.equal(draw(in_blocks(model, without(key)), "sd15"), want), key


@METHODS
def test_all_of_them_may_be_missing_at_once(method: Callable[[Any], Any]) -> None:
    kept = {*ALWAYS, *(("block",) if method is idadapter else ())}
    model = method(unet("sd15"))

    def passed(options: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in kept}

    assert torch.equal(draw(in_blocks(model, passed), "sd15"), draw(model, "sd15"))


def test_gated_layers_that_are_told_no_block_say_so(warnings_on: Any) -> None:
    """A gated layer belongs to one block; which, only the block can tell."""
    model = idadapter(unet("sd15"))
    assert draw(in_blocks(model, without("block")), "sd15").isfinite().all()
    assert any("without saying which" in text for text in warnings_on("Apply ID Adapter"))


@METHODS
def test_any_key_of_a_model_call_may_be_missing(method: Callable[[Any], Any]) -> None:
    """Also the noise level: it is an argument of the call, too."""
    through = method(around_calls(unet("sd15"), lambda options: options))
    want = draw(through, "sd15")
    keys = keys_seen(lambda model, passed: method(around_calls(unet("sd15"), passed)), unet("sd15"), "sd15")
    for key in sorted(keys):
        found = draw(method(around_calls(unet("sd15"), without(key))), "sd15")
        assert difference(found, want) == 0, key


def test_conditionings_without_text_or_model_values() -> None:
    """A guider of another node may hand over less than ComfyUI's own."""
    from ComfyUI_IDAdapter.nodes.host.wrappers import calc_cond_batch

    handed: list[Any] = []

    def executor(model: Any, conds: list[Any], *args: Any) -> None:
        handed.append(conds)

    conds: list[Any] = [[{}, {"model_conds": {}}], None]
    calc_cond_batch(executor, None, conds, torch.zeros(1, 4, 8, 8), torch.ones(1), {})
    assert handed == [conds]
