"""Tiny IDAdapters for the tiny checkpoints and the tiny CLIP vision: random weights, open gates, changed K/V weights, and
untrained ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from idadapter_core.adapter import Adapter, build_adapter, initial_adapter, save_adapter
from idadapter_core.methods.idadapter import METHOD, IDAdapterConfig, IDAdapterEncoder, IDAdapterLayers
from idadapter_core.types import FaceFeatures
from tests.golden import recipe
from tests.tiny.features import face_features
from tests.tiny.vision import PATCHES, WIDTH

_SMALL = IDAdapterConfig(
    vision_width=WIDTH,
    vision_patches=PATCHES,
    mixer_heads=4,
    text_encoders=("l",),
    text_widths=(64,),
    text_hidden=32,
    context_width=64,
    site_widths=(32, 64, 64, 64, 32, 32, 64),
    site_heads=(4,) * 7,
)
CONFIGS = {
    "sd15": _SMALL,
    "sd21": replace(_SMALL, text_encoders=("h",), site_heads=(2, 4, 4, 4, 2, 2, 4)),
    "sdxl": replace(
        _SMALL,
        text_encoders=("l", "g"),
        text_widths=(64, 64),
        context_width=128,
        site_widths=(64,) * 11,
        site_heads=(4,) * 11,
    ),
}
"""By the kinds of `tests/tiny/checkpoints.py`."""

RESAMPLED_CONFIG = replace(CONFIGS["sdxl"], tokens=8)

FILE_NAMES = {kind: f"idadapter_tiny_{kind}.safetensors" for kind in CONFIGS}
FRESH_NAMES = {kind: f"idadapter_fresh_{kind}.safetensors" for kind in CONFIGS}
"""Untrained: gates and K/V deltas of exactly 0."""
RESAMPLED_NAME = "idadapter_resampled_sdxl.safetensors"
"""Whose identities have 8 tokens, however many photos there are."""


def idadapter_state(
    config: IDAdapterConfig, seed: int = 0, *, gate: float = 0.5, delta: float = 0.3
) -> dict[str, torch.Tensor]:
    """All weights under the names they have in files.

    Gates are around `gate`, before tanh; the K/V deltas are as large as `delta` times usual weights. 0 means exactly 0.
    """
    with torch.device("meta"):
        encoder, layers = IDAdapterEncoder(config), IDAdapterLayers(config)
    shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    shapes |= {f"layers.{key}": tensor.shape for key, tensor in layers.state_dict().items()}
    state = {key: recipe.weight(seed, key, shape or (1,)).reshape(shape) for key, shape in shapes.items()}
    for key, tensor in state.items():
        if "gate_" in key:
            state[key] = gate * (1 + tensor)
        elif key.startswith("layers.deltas."):
            state[key] = delta * tensor
    return state


def tiny_idadapter(config: IDAdapterConfig, seed: int = 0, **strengths: float) -> Adapter:
    """An adapter in memory; `strengths` as in `idadapter_state`."""
    return build_adapter(METHOD.name, config, idadapter_state(config, seed, **strengths), f"tiny {seed}")


def vision_features(seed: int, count: int = 1, **facts: object) -> FaceFeatures:
    """`count` made-up faces with CLIP vision features of the tiny width; `facts` as in `face_features`."""
    features = face_features(seed, count, **facts)  # type: ignore[arg-type]
    return replace(
        features,
        stages=(),
        patch_tokens=recipe.value(seed, "patch_tokens", (count, PATCHES, WIDTH)),
        class_embedding=recipe.value(seed, "class_embedding", (count, WIDTH)),
    )


def write_tiny_idadapters(models_dir: Path) -> None:
    """Write the adapters named above below `models_dir`/idadapter."""
    folder = models_dir / "idadapter"
    for kind, config in CONFIGS.items():
        save_adapter(tiny_idadapter(config), folder / FILE_NAMES[kind])
        save_adapter(initial_adapter(config, f"fresh {kind}"), folder / FRESH_NAMES[kind])
    save_adapter(tiny_idadapter(RESAMPLED_CONFIG), folder / RESAMPLED_NAME)
