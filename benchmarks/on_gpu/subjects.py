"""The sampled models: the plain MODEL, and clones of it with each method applied by the pack's own nodes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.on_gpu.machine import device
from benchmarks.on_gpu.parts import Sizes
from tests.harness.comfy import pack_nodes

PLAIN = "plain"
_SIZES = 6 * 256  # width of SDXL's size embeddings, in addition to the pooled text
_APPLIED = (
    ("uniid", 1, "UniID"),
    ("idadapter", 1, "IDAdapter, one photo"),
    ("idadapter", 4, "IDAdapter, four photos"),
)


@dataclass(frozen=True)
class Subject:
    """A MODEL with its name in tables."""

    name: str
    model: Any


def dtype_of(sizes: Sizes) -> torch.dtype:
    return torch.bfloat16 if sizes.half else torch.float32


@cache
def unet(sizes: Sizes) -> Any:
    return models.unet(sizes.family, dtype_of(sizes), device(), sizes.tiny)


@cache
def adapter(method: str, sizes: Sizes) -> Any:
    """Output of Load ID Adapter, with random weights."""
    config = models.adapter_config(method, sizes.family)
    if sizes.tiny:
        from tests.tiny import idadapter, uniid

        uniid_sizes = {"sd15": uniid.TINY_SD15, "sdxl": uniid.TINY_SDXL}
        tiny = (uniid_sizes if method == "uniid" else idadapter.CONFIGS)[sizes.family]
        config = type(config)(**asdict(tiny))
    return models.loaded_adapter(method, config, dtype_of(sizes), device())


def features(method: str, sizes: Sizes, photos: int) -> Any:
    """Random photo features for the adapter."""
    config = adapter(method, sizes).adapter.config
    if method == "uniid":
        return models.face_features(photos)
    return models.face_features(photos, (config.vision_width, config.vision_patches))


def identity(method: str, sizes: Sizes, photos: int) -> Any:
    from ComfyUI_IDAdapter.idadapter_core import Mix

    return adapter(method, sizes).encode(features(method, sizes, photos), Mix())


def node(node_id: str, *arguments: Any, **inputs: Any) -> Any:
    """The first output of one of the pack's nodes."""
    with torch.inference_mode():
        return pack_nodes()[node_id].execute(*arguments, **inputs).result[0]


def subjects(sizes: Sizes) -> list[Subject]:
    """The plain model first; the others are made from it by nodes."""
    found = [Subject(PLAIN, unet(sizes))]
    for method, photos, name in _APPLIED[: sizes.subjects]:
        person = identity(method, sizes, photos)
        count = person.adapter_tokens.shape[1]
        applied = node("IDAdapterApply", unet(sizes), adapter(method, sizes), person, 1.0, 0.0, 1.0)
        if method == "uniid":
            scales = {"adapter_early": 0.8, "adapter_late": 1.2, "text_early": 0.5, "text_late": 1.8}
            applied = node(
                "IDAdapterRescale",
                applied,
                mode="normalized",
                scope="ID adapters",
                early_fraction=1 / 6,
                **scales,
            )
        found.append(Subject(f"{name} ({count} tokens)", applied))
    return found


def sample(
    model: Any, sizes: Sizes, steps: int | None = None, callback: Callable[..., None] | None = None
) -> Tensor:
    """Sample with Euler and CFG from an empty latent. `steps` defaults to that of the sizes."""
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    prompts = [_prompt(sizes, generator) for _ in range(2)]
    noise = torch.randn(1, 4, sizes.pixels // 8, sizes.pixels // 8, generator=generator)
    with torch.inference_mode():
        drawn: Tensor = comfy.sample.sample(
            model,
            noise,
            steps or sizes.steps,
            5.0,
            "euler",
            "normal",
            *prompts,
            torch.zeros_like(noise),
            disable_pbar=True,
            callback=callback,
            seed=0,
        )
    return drawn


def _prompt(sizes: Sizes, generator: torch.Generator) -> list[list[Any]]:
    """A conditioning of random text states."""
    widths = unet(sizes).model.model_config.unet_config
    states = torch.randn(1, 77, widths["context_dim"], generator=generator)
    if widths["adm_in_channels"] is None:
        return [[states, {}]]
    return [
        [states, {"pooled_output": torch.randn(1, widths["adm_in_channels"] - _SIZES, generator=generator)}]
    ]


def in_turns(found: list[Subject], rounds: int) -> list[list[Subject]]:
    """All subjects in each round, in a different order."""
    return [random.Random(number).sample(found, len(found)) for number in range(rounds)]
