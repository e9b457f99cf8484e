"""ComfyUI's UNets at full width, and adapters for them, with random weights, for benchmarks that sample.

Nothing is read from disk. The functions require that ComfyUI and the pack are imported (`tests.harness.comfy`); ComfyUI chooses the
devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import adapter_state, fill

SD15_WIDTHS = (320,) * 2 + (640,) * 2 + (1280,) * 2 + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
_ANY: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
        "num_heads": 8,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "num_classes": None,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_heads": -1,
        "num_head_channels": 64,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}


def unet(
    family: str,
    dtype: torch.dtype,
    draw_on: torch.device | str = "cpu",
    tiny: bool = False,
    disable_dynamic: bool = False,
) -> Any:
    """A UNet as a MODEL that computes in `dtype`, loaded as ComfyUI loads a checkpoint.

    Args:
        family: sd15 or sdxl.
        draw_on: see `networks.fill`.
        tiny: use the tests' UNet instead of the full-width one.
        disable_dynamic: set by ComfyUI when it calls this function again because dynamic VRAM does not work.
    """
    import comfy.model_management as memory
    import comfy.model_patcher as patchers

    config = _config(family, dtype, tiny)
    offload = memory.unet_offload_device()
    state = _random_state(config, offload, draw_on)
    model = config.get_model({}, "", device=offload)
    kind = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    patcher = kind(model, load_device=memory.get_torch_device(), offload_device=offload)
    model.diffusion_model.load_state_dict(state, strict=False, assign=True)
    patcher.cached_patcher_init = (unet, (family, dtype, draw_on, tiny))
    return patcher


def _config(family: str, dtype: torch.dtype, tiny: bool) -> Any:
    """ComfyUI's configuration of a model."""
    import comfy.supported_models as supported

    kind = {"sd15": supported.SD15, "sdxl": supported.SDXL}[family]
    sizes = {**_ANY, **_FAMILIES[family]}
    if tiny:
        from tests.tiny import checkpoints
        from tests.tiny.tiny_pack import models as small

        kind = {"sd15": small.TinySD15, "sdxl": small.TinySDXL}[family]
        classes = {"num_classes": _FAMILIES[family]["num_classes"]}
        sizes = {**checkpoints._ANY_UNET, **kind.unet_config, **checkpoints._LEVELS[family], **classes}
    config = kind({**sizes, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    return config


def _random_state(config: Any, device: Any, draw_on: torch.device | str) -> dict[str, Tensor]:
    """All weights of the UNet of a configuration.

    Made without dynamic VRAM, with which ComfyUI's layers have no weights before a file is loaded.
    """
    import comfy.memory_management as dynamic

    was_on, dynamic.aimdo_enabled = dynamic.aimdo_enabled, False
    try:
        state: dict[str, Tensor] = config.get_model({}, "", device=device).diffusion_model.state_dict()
    finally:
        dynamic.aimdo_enabled = was_on
    fill(state, draw_on)
    return state


def adapter_config(method: str, family: str) -> Any:
    """The published sizes of an adapter; for IDAdapter, those of the paper."""
    from ComfyUI_IDAdapter.idadapter_core.methods import METHODS

    parts = METHODS[method]
    if parts.presets:
        return parts.presets[family]
    if family == "sdxl":
        return parts.config()
    return parts.config(text_widths=(768,), context_width=768, site_widths=SD15_WIDTHS)


def loaded_adapter(method: str, config: Any, dtype: torch.dtype, draw_on: torch.device | str = "cpu") -> Any:
    """Output of Load ID Adapter, with open gates if the method has gates."""
    import comfy.ops
    from ComfyUI_IDAdapter.idadapter_core.adapter import build_adapter
    from ComfyUI_IDAdapter.nodes.host.memory import LoadedAdapter, manage

    state = adapter_state(method, config, dtype, draw_on)

    def build() -> Any:
        adapter = build_adapter(method, config, state, f"random {method}", operations=comfy.ops.manual_cast)
        encoder = manage(adapter.encoder, lambda: build().patcher)
        gates: Any = adapter.mechanisms.gated
        if gates is None:
            return LoadedAdapter(adapter, encoder)
        gates.adapter_digest = adapter.digest
        return LoadedAdapter(adapter, encoder, manage(gates, lambda: build().gates))

    return build()


def face_features(count: int, vision: tuple[int, int] = (1024, 256), seed: int = 0) -> Any:
    """Random features of `count` photos for both methods. `vision`: width and patches of CLIP vision."""
    from ComfyUI_IDAdapter.idadapter_core import FaceFeatures

    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    width, patches = vision
    return FaceFeatures(
        embedding=drawn(512),
        stages=tuple(drawn(c, side, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
        patch_tokens=drawn(patches, width),
        class_embedding=drawn(width),
    )
