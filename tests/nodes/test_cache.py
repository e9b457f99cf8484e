"""What is computed once per run, what is freed after it, and what never waits for the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.nodes.sampling import (
    SITE_COUNT,
    Block,
    ModelCall,
    Replacement,
    adapter,
    apply,
    around_sites,
    draw,
    noise,
    person,
    record,
    rescale,
    unet,
)
from tests.nodes.test_other_packs import other_node


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The sites that have been projected, by kind of adapter, as it happens."""
    seen: list[tuple[str, int]] = []
    for kind in ("sdxl", "sd15"):
        projections = adapter(kind).adapter.layers
        original: Callable[..., Any] = projections.project

        def spy(index: int, tokens: Tensor, kind: str = kind, original: Callable[..., Any] = original) -> Any:
            seen.append((kind, index))
            return original(index, tokens)

        monkeypatch.setattr(projections, "project", spy)
    return seen


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize("steps", [1, 4])
def test_keys_and_values_are_projected_once_per_run(
    kind: str, steps: int, projected: list[tuple[str, int]]
) -> None:
    model = rescale(apply(unet(kind), kind, person(kind)), adapter_early=0.8)
    for run in (1, 2):
        draw(model, kind, steps=steps, latent_noise=noise(2))
        # One projection for each site and role.
        assert len(projected) == run * SITE_COUNT[kind]
    assert len(set(projected)) == SITE_COUNT[kind]


def test_calls_of_other_rows_share_the_projections(projected: list[tuple[str, int]]) -> None:
    """Perturbed-attention guidance adds a call with the positive rows alone."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = apply(unet("sd15"), "sd15", person("sd15"))
    draw(PerturbedAttentionGuidance.execute(model, 3.0).result[0], "sd15")
    assert len(projected) == SITE_COUNT["sd15"]


def test_nothing_is_projected_where_nothing_acts(projected: list[tuple[str, int]]) -> None:
    identity = person("sd15")
    for model in (
        apply(unet("sd15"), "sd15", identity, 0.0),
        apply(unet("sd15"), "sd15", identity, mask=torch.zeros(1, 8, 8)),
        apply(unet("sd15"), "sd15", identity, start=0.5, end=0.5),
    ):
        draw(model, "sd15")
    assert projected == []


def test_caches_are_freed_after_the_run() -> None:
    model, calls = record(rescale(apply(unet("sd15"), "sd15", person("sd15"), mask=torch.ones(1, 9, 7))))
    draw(model, "sd15")
    assert cached(calls[0].own.run) == 0
    run = weakref.ref(calls[0].own.run)
    calls.clear()
    gc.collect()
    assert run() is None, "the run outlives its sampling"


def cached(run: Any) -> int:
    """How many tensors a run still holds."""
    stores = [value for value in vars(run).values() if isinstance(value, dict)]
    assert len(stores) >= 4
    return sum(len(store) for store in stores)


def assert_freed_when_interrupted(model: Any, calls: Sequence[ModelCall]) -> None:
    """Cancel a run of an SD1.5 model after its first step. `calls` records the model's calls."""
    import comfy.model_management as memory

    def stop(step: int, *_: Any) -> None:
        assert cached(calls[0].own.run) > 0
        memory.interrupt_current_processing()
        memory.throw_exception_if_processing_interrupted()

    with pytest.raises(memory.InterruptProcessingException):
        draw(model, "sd15", steps=3, callback=stop)
    assert len(calls) == 1
    assert cached(calls[0].own.run) == 0
    # And the next run works.
    assert draw(model, "sd15", steps=1).isfinite().all()


def test_caches_are_freed_when_the_run_is_interrupted() -> None:
    assert_freed_when_interrupted(*record(apply(unet("sd15"), "sd15", person("sd15"))))


class NoWaiting(TorchDispatchMode):
    """Raises where the host would have to read a value from the device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "allclose", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_layer_waits_for_the_device() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(torch.ones(()))

    watched: list[Block] = []

    def guard(_: ModelCall, block: Block, replacement: Replacement) -> Replacement:
        def guarded(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            watched.append(block)
            with NoWaiting():
                return replacement(q, k, v, extra)

        return guarded

    kind = "sdxl"
    masks = torch.rand(2, 24, 40, generator=torch.Generator().manual_seed(0))
    model, _ = other_node(unet(kind), kind)
    model = apply(apply(model, kind, person(kind, 1), mask=masks), kind, person(kind, 2))
    model = rescale(model, scope="every attention patch", adapter_early=0.8)
    draw(around_sites(model, guard), kind, steps=2, latent_noise=noise(2))
    assert len(watched) == 2 * SITE_COUNT[kind]
