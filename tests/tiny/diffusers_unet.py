"""The tiny UNets of `tests/tiny/checkpoints.py` as diffusers has them. Needs diffusers, and no ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from idadapter_core.adapter import Adapter
from idadapter_core.stable_diffusion.inject import Injected
from tests.golden import recipe
from tests.harness.shim import run_shim

_SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": 64,
}
# `attention_head_dim` is what diffusers calls the number of heads.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**_SMALL, "attention_head_dim": 4},
    "sd21": {
        **_SMALL,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 128,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    },
}
"""By the kinds of `tests/tiny/checkpoints.py`."""


def diffusers_unet(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A UNet2DConditionModel of that kind with random weights, for evaluation; `changes` of its configuration."""
    run_shim()
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**{**CONFIGS[kind], **changes}).requires_grad_(False).eval()
    recipe.fill(model, seed, "diffusers.")
    return model


def inputs(kind: str, rows: int = 2, size: int = 8, length: int = 7) -> dict[str, Any]:
    """What such a UNet is called with, different for each row."""

    def value(name: str, *shape: int) -> Tensor:
        return recipe.value(0, f"diffusers.{name}", (rows, *shape))

    given: dict[str, Any] = {
        "sample": value("sample", 4, size, size),
        "timestep": torch.tensor([981, 1, 500, 250])[:rows],
        "encoder_hidden_states": value("text", length, CONFIGS[kind]["cross_attention_dim"]),
    }
    if kind == "sdxl":
        given["added_cond_kwargs"] = {
            "text_embeds": value("pooled", 64),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, -1),
        }
    return given


def predict(unet: Any, kind: str = "sd15", rows: int = 2, **changes: Any) -> Tensor:
    """What such a UNet gives for `inputs`, without gradients."""
    with torch.no_grad():
        out: Tensor = unet(**inputs(kind, rows), **changes).sample
    return out


def loss_of(unet: Any, kind: str = "sd15") -> Tensor:
    """A number that depends on all that the UNet gives."""
    out: Tensor = unet(**inputs(kind)).sample
    return (out * recipe.value(0, "unet.target", out.shape).to(out)).sum()


def gradients_of(
    unet: Any,
    kind: str,
    leaves: Mapping[str, Tensor],
    checkpointing: bool,
    after: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The gradients of `loss_of`, with or without checkpointing; `after` runs between the forward and the backward pass."""
    if checkpointing:
        unet.enable_gradient_checkpointing()
    calls: list[int] = []
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = loss_of(unet, kind)
    after()
    calls.clear()
    loss.backward()
    assert bool(calls) == checkpointing, "blocks run again in the backward pass if checkpointed"
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    """The parameters of an adapter's layers, ready to learn."""
    adapter.layers.requires_grad_(True)
    return dict(adapter.layers.named_parameters())


def observed(injected: Injected) -> list[tuple[int, Tensor, Tensor]]:
    """What an observer is told from now on."""
    told: list[tuple[int, Tensor, Tensor]] = []
    injected.observe(lambda *given: told.append(given))
    return told


@contextmanager
def failing(module: nn.Module, error: Exception) -> Iterator[None]:
    """A module that raises when it is called."""

    def fail(*_: Any) -> None:
        raise error

    hook = module.register_forward_pre_hook(fail)
    yield
    hook.remove()


def relative(left: Tensor, right: Tensor) -> float:
    """How far two tensors are apart, by the norm of the second."""
    return float((left.float() - right.float()).norm() / right.float().norm())


def traces(unet: Any) -> list[Any]:
    """All that a hook or an attribute could leave on the modules of a UNet."""
    found = []
    for name, module in unet.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "hook" in key and value}
        found.append((name, sorted(vars(module)), hooks))
    return found


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    """`inputs` in double precision."""
    return {
        key: in_double(value)
        if isinstance(value, dict)
        else value.double()
        if value.is_floating_point()
        else value
        for key, value in given.items()
    }
