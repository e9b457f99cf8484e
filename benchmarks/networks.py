"""The networks around an adapter at real size, without weights, to count operations or measure training.

They are on the meta device, which only tracks shapes; `filled` copies them to a real device with random weights. Needs diffusers and
transformers, not ComfyUI.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from idadapter_core.faces.iresnet import IRESNET100_LAYERS, IResNet
from idadapter_core.methods import METHODS
from idadapter_core.stable_diffusion.single_file import _UNETS, KL, TEXT_ENCODERS
from idadapter_core.stable_diffusion.text import TextEncoders

ENCODERS = {"sd15": "l", "sd21": "h", "sdxl": "lg"}
IRESNET50_LAYERS = (3, 4, 14, 3)  # as in configs/idadapter_*.toml
FACTOR = 8  # image pixels per latent pixel, per side
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
"""CLIP ViT-L/14."""


@cache
def unet(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**_UNETS[family]).requires_grad_(False)


@cache
def text_encoders(family: str) -> TextEncoders:
    """Text encoders without tokenizers, for inputs that are tokens already."""
    import transformers

    models, tokenizers = {}, {}
    for name in ENCODERS[family]:
        kind = "CLIPTextModelWithProjection" if name == "g" else "CLIPTextModel"
        config = transformers.CLIPTextConfig(**TEXT_ENCODERS[name])
        with torch.device("meta"):
            models[name] = getattr(transformers, kind)(config)
        tokenizers[name] = SimpleNamespace(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return TextEncoders(family, models, tokenizers).requires_grad_(False)


@cache
def vision() -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).requires_grad_(False)


@cache
def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**KL).requires_grad_(False)


@cache
def recognizer(with_stages: bool) -> IResNet:
    """iResNet-100 for methods that read its stages (UniID), otherwise the iResNet-50 of buffalo_l."""
    with torch.device("meta"):
        network = IResNet(IRESNET100_LAYERS if with_stages else IRESNET50_LAYERS)
    return network.requires_grad_(False)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def filled(network: Any, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
    """Copy a network to a device with random weights, in evaluation mode."""
    network = copy.deepcopy(network).to(dtype)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        network = network.to_empty(device=device)
    fill(network.state_dict(keep_vars=True), device)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
    return network.eval()


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], device: torch.device | str, seed: int = 0) -> None:
    """Fill tensors with random weights of usual size, in place: matrices keep the norm of their inputs, norms are the identity.

    Args:
        device: device of the random generator, which affects the numbers. The tensors stay where they are.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.ndim > 1:
            drawn = torch.randn(tensor.shape, generator=generator, device=device)
            tensor.copy_(drawn.div_(tensor[0].numel() ** 0.5))
        elif tensor.ndim == 1:
            tensor.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)
        else:
            tensor.fill_(0.5)  # a gate


def adapter_state(
    method: str, config: Any, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Random weights of an adapter on the CPU, named as in adapter files. `device`: of the random generator."""
    parts = METHODS[method]
    with torch.device("meta"):
        encoder, layers = parts.encoder(config), parts.layers(config, nn)
    shapes = {
        **encoder.state_dict(),
        **{parts.files.layers_prefix + name: tensor for name, tensor in layers.state_dict().items()},
    }
    state = {name: torch.empty(tensor.shape, dtype=dtype) for name, tensor in shapes.items()}
    fill(state, device)
    for name in state:
        if ".deltas." in name:
            state[name] *= 0.1
    return state
