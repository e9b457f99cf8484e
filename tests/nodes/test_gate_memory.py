"""Gated layers in ComfyUI's hands: loaded with their model, what is computed once per run, precision, waiting for the device."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes.idadapter_sampling import (
    KINDS,
    Made,
    adapter,
    adapter_file,
    apply,
    assert_gates,
    at_work,
    person,
    positive,
    record_gates,
    sites,
)
from tests.nodes.sampling import SITE_COUNT, difference, draw, noise, prompt, rescale, sample, unet
from tests.nodes.test_cache import NoWaiting, assert_freed_when_interrupted, cached
from tests.tiny.checkpoints import tiny_unet


@contextmanager
def lengths(made: Made, layer: str = "to_qkv") -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Rows and tokens of everything that goes through a layer of the gates, by site, as it happens."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    hooks = []
    for number, gate in adapter(made).adapter.layers.gates.items():
        shapes = seen[number] = []

        def note(_: Any, arguments: tuple[Tensor, ...], __: Any, shapes: Any = shapes) -> None:
            shapes.append(tuple(arguments[0].shape[:2]))

        hooks.append(getattr(gate, layer).register_forward_hook(note))
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4])
def test_identity_is_projected_once_per_run(kind: str, steps: int) -> None:
    """At the steps themselves the layers see image tokens alone: no queries are made for E_r, and no keys again."""
    made = Made(kind)
    identity = person(made)
    model, calls = record_gates(apply(unet(kind), made, identity))
    count = identity.adapter_tokens.shape[1]
    for _ in range(2):
        with lengths(made) as seen, lengths(made, "linear") as projected:
            draw(model, kind, steps=steps)
        assert len(seen) == SITE_COUNT[kind]
        assert all(shapes == [(1, count)] for shapes in projected.values())
        tokens = {str(sites(kind)[block]): site.before.shape[1] for block, site in calls[0].gates}
        assert len(set(tokens.values())) > 1, "the sites differ in nothing"
        for number, shapes in seen.items():
            # The positive row alone, in each step.
            assert shapes == [(1, count)] + steps * [(1, tokens[number])]


def test_people_of_as_many_tokens_are_projected_together() -> None:
    kind, made = "sd15", Made("sd15")
    model = unet(kind)
    for number, photos in ((1, 4), (2, 4), (3, 2)):
        model = apply(model, made, person(made, number, photos), 0.5)
    with lengths(made, "linear") as projected:
        draw(model, kind, steps=2)
    assert all(sorted(shapes) == [(1, 33), (2, 65)] for shapes in projected.values())


def test_calls_of_other_rows_share_the_projections() -> None:
    """Perturbed-attention guidance adds a call with the positive rows alone."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    made = Made("sd15")
    model = apply(unet("sd15"), made, person(made))
    with lengths(made, "linear") as projected:
        draw(PerturbedAttentionGuidance.execute(model, 3.0).result[0], "sd15")
    assert all(len(shapes) == 1 for shapes in projected.values())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_loaded_with_the_model(kind: str) -> None:
    """ComfyUI counts them, and the model that is sampled names them as its own."""
    import comfy.model_management as memory
    from comfy.patcher_extension import WrappersMP
    from ComfyUI_IDAdapter.nodes.host.plan import KEY

    made = Made(kind)
    gates = adapter(made).gates
    used: list[bool] = []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        used.append(any(loaded.model is gates.model for loaded in memory.loaded_models(True)))
        (own,) = executor.class_obj.current_patcher.get_additional_models_with_key(KEY)
        assert own.model is gates.model
        return executor(*args, **kwargs)

    memory.unload_all_models()
    model = apply(unet(kind), made, person(made))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", look)
    assert not any(loaded.model is gates.model for loaded in memory.loaded_models())
    draw(model, kind, steps=2)
    assert used == [True, True]
    assert gates.model_size() == sum(p.numel() * p.element_size() for p in gates.model.parameters())


def test_two_people_share_the_layers() -> None:
    made = Made("sd15")
    model = apply(apply(unet("sd15"), made, person(made, 1)), made, person(made, 2))
    assert [patcher.model for patcher in model.get_additional_models()] == [adapter(made).gates.model]


def test_models_for_comfyuis_accounting() -> None:
    loaded = adapter(Made("sd15"))
    assert loaded.get_models() == [loaded.patcher, loaded.gates]


def test_layers_that_comfyui_builds_anew() -> None:
    """As for a second device: an independent copy, read from the file, is what runs there."""
    from ComfyUI_IDAdapter.nodes.host.plan import KEY

    kind, made = "sd15", Made("sd15")
    rebuild, arguments = adapter(made).gates.cached_patcher_init
    copied = rebuild(*arguments)
    assert copied.model is not adapter(made).gates.model
    for key, tensor in adapter(made).gates.model.state_dict().items():
        assert torch.equal(copied.model.state_dict()[key], tensor)
    model = apply(unet(kind), made, person(made))
    elsewhere = model.clone()
    elsewhere.set_additional_models(KEY, [copied])
    runs: list[str] = []
    hook = copied.model["1"].to_qkv.register_forward_hook(lambda *_: runs.append("copy"))
    assert torch.equal(draw(elsewhere, kind), draw(model, kind))
    hook.remove()
    assert len(runs) == 3, "the copy did not run"


def test_caches_are_freed_after_the_run() -> None:
    made = Made("sd15")
    applied = rescale(apply(unet("sd15"), made, person(made), mask=torch.ones(1, 9, 7)), gated=True)
    model, calls = record_gates(applied)
    draw(model, "sd15")
    assert cached(calls[0].own.run) == 0
    run = weakref.ref(calls[0].own.run)
    calls.clear()
    gc.collect()
    assert run() is None, "the run outlives its sampling"


def test_caches_are_freed_when_the_run_is_interrupted() -> None:
    made = Made("sd15")
    assert_freed_when_interrupted(*record_gates(apply(unet("sd15"), made, person(made))))


@pytest.mark.parametrize("gated", [False, True])
def test_no_layer_waits_for_the_device(gated: bool) -> None:
    from comfy.patcher_extension import WrappersMP
    from ComfyUI_IDAdapter.nodes.host.gated import GatePatch, remember_norm

    kind, one, two = "sdxl", Made("sdxl"), Made("sdxl", seed=3, unconditional="zeros")
    watched: Counter[str] = Counter()

    def guard(patch: Any) -> Any:
        if not isinstance(patch, GatePatch) and patch is not remember_norm:
            return patch

        def guarded(x: Tensor, extra: dict[str, Any]) -> Tensor:
            watched[type(patch).__name__] += 1
            with NoWaiting():
                out: Tensor = patch(x, extra)
            return out

        return guarded

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patches = {name: [guard(p) for p in some] for name, some in args[5]["patches"].items()}
        return executor(*args[:5], {**args[5], "patches": patches}, **kwargs)

    masks = torch.rand(2, 24, 40, generator=torch.Generator().manual_seed(0))
    model = apply(apply(unet(kind), one, person(one, 1), mask=masks), one, person(one, 2, photos=2))
    model = rescale(apply(model, two, person(two)), adapter_early=0.8, gated=gated)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    draw(model, kind, steps=2, latent_noise=noise(2))
    assert watched["GatePatch"] == 2 * SITE_COUNT[kind]
    assert watched["function"] == (2 * SITE_COUNT[kind] if gated else 0)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 0.01), (torch.bfloat16, 0.08), (torch.float8_e4m3fn, 0.8)],
    ids=["fp16", "bf16", "fp8"],
)
def test_base_weights(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    made = Made(kind)
    result = draw(apply(tiny_unet(kind, dtype=dtype), made, person(made)), kind, cfg=1.0)
    assert result.isfinite().all()
    assert difference(result, draw(apply(unet(kind), made, person(made)), kind, cfg=1.0)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("gated", "gate"), [(False, 0.5), (True, 0.5), (True, 0.02)])
def test_layers_in_half_precision(dtype: torch.dtype, gated: bool, gate: float) -> None:
    """As on a GPU: the UNet itself works in half precision, whatever the adapter's file holds."""
    kind = "sdxl"
    made = Made(kind, gate=gate)

    def ours(model: Any) -> Any:
        applied = apply(model, made, person(made, photos=2), mask=torch.ones(1, 8, 8))
        return rescale(applied, gated=True, adapter_late=0.7) if gated else applied

    half = tiny_unet(kind, dtype=dtype)
    half.model.manual_cast_dtype = None
    half.set_model_compute_dtype(dtype)
    model, calls = record_gates(ours(half))
    result = draw(model, kind)
    assert {site.after.dtype for call in calls for _, site in call.gates} == {dtype}
    assert result.isfinite().all()
    assert difference(result, draw(ours(unet(kind)), kind)) < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_adapter_weights(dtype: torch.dtype) -> None:
    """The file's dtype is kept in memory; the mathematics is that of the weights as stored."""
    kind = "sdxl"
    made = Made(kind, dtype=dtype)
    assert {p.dtype for p in adapter(made).gates.model.parameters()} == {dtype}
    model, calls = record_gates(apply(unet(kind), made, person(made)))
    pos, neg = prompt(kind, "positive"), prompt(kind, "negative")
    sample(model, pos, neg, steps=1)
    assert sorted(assert_gates(made, calls[0], [(pos, [positive(person(made))]), (neg, [])])) == [0, 1]
    full = Made(kind)
    assert difference(draw(model, kind), draw(apply(unet(kind), full, person(full)), kind)) < 0.1
    left, right = (
        at_work(apply(unet(kind), made, person(made))),
        at_work(apply(unet(kind), full, person(full))),
    )
    assert all(difference(left[key], right[key]) < 0.01 for key in left)


def test_a_file_loads_where_layers_get_their_weights_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamic VRAM, ComfyUI's default on NVIDIA, its layers have no weights before a state dict brings them."""
    import comfy.memory_management
    import comfy.ops
    from ComfyUI_IDAdapter.nodes.adapter import load

    made = Made("sd15")
    usual = load(adapter_file(made), None)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True, raising=False)
    if comfy.ops.manual_cast.Linear(2, 2).weight is not None:
        pytest.skip("this ComfyUI is older than layers without weights")
    late = load(adapter_file(made), None)
    assert late.adapter.digest == usual.adapter.digest
    tokens = person(made).adapter_tokens
    for one, other in zip(
        usual.adapter.layers.gates["3"].project(tokens),
        late.adapter.layers.gates["3"].project(tokens),
        strict=True,
    ):
        assert torch.equal(one, other)
