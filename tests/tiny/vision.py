"""Tiny CLIP vision models with random weights: ComfyUI's own class, key names and loader, 1 to 3 megabytes.

Both take pictures of 224 x 224 px, as CLIP does, in 4 x 4 patches of 56 px, and have 3 layers of 4 heads.

| file                                | width | MLP | projection | parameters |
|-------------------------------------|-------|-----|------------|------------|
| tiny_clip_vision.safetensors        | 64    | 128 | 32         | 0.71 M     |
| tiny_clip_vision_narrow.safetensors | 32    | 64  | 32         | 0.33 M     |

ComfyUI knows CLIP's real sizes only. The pack in `tests/tiny/tiny_pack`, which holds the configurations, teaches it these.

Importing this module is free; `tiny_clip_vision` needs ComfyUI importable (see `tests/harness/comfy.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from tests.golden import recipe

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel

WIDTH = 64
"""Width d of the hidden states of the one that fits the tiny adapters."""
NARROW_WIDTH = 32

FILE_NAMES = {WIDTH: "tiny_clip_vision.safetensors", NARROW_WIDTH: "tiny_clip_vision_narrow.safetensors"}
"""File name of each width, in the `clip_vision` folder: what `CLIPVisionLoader` is given."""


def config_file(width: int) -> Path:
    """ComfyUI's JSON configuration of the model of this width."""
    return Path(__file__).with_name("tiny_pack") / f"clip_vision_{width}.json"


def _config(width: int) -> dict[str, Any]:
    return dict(json.loads(config_file(width).read_text(encoding="utf-8")))


TINY_VISION = _config(WIDTH)
"""Configuration of the model of width `WIDTH`."""
PATCHES = (TINY_VISION["image_size"] // TINY_VISION["patch_size"]) ** 2
"""Patch tokens of a picture, without the class token; alike for both widths."""


def vision_state(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """All weights of the model of this width, fp32, under the names of published CLIP vision files."""
    return {name: recipe.weight(0, name, shape) for name, shape in shapes(_config(width)).items()}


def tiny_clip_vision(width: int = WIDTH) -> ClipVisionModel:
    """A CLIP_VISION with the weights of the file of this width."""
    from comfy.clip_vision import ClipVisionModel

    clip_vision = ClipVisionModel(str(config_file(width)))
    clip_vision.load_sd(vision_state(width))
    return clip_vision


def write_tiny_clip_vision(models_dir: Path) -> dict[int, Path]:
    """Write both models below `models_dir`/clip_vision; the paths by width."""
    folder = models_dir / "clip_vision"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {width: folder / name for width, name in FILE_NAMES.items()}
    for width, path in paths.items():
        save_file(vision_state(width), path)
    return paths


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a configuration, by published name."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, config["num_channels"], patch, patch),
        "vision_model.embeddings.position_embedding.weight": (
            (config["image_size"] // patch) ** 2 + 1,
            width,
        ),
        "visual_projection.weight": (config["projection_dim"], width),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    linears: dict[str, tuple[int, int]] = {}
    for number in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{number}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        linears |= {f"{layer}.self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        linears |= {f"{layer}.mlp.fc1": (inner, width), f"{layer}.mlp.fc2": (width, inner)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
