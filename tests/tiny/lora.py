"""Tiny LoRAs with random weights for the tiny checkpoints. They change the K weights of every cross-attention, which
IDAdapter changes too."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden import recipe
from tests.tiny.checkpoints import CHECKPOINT_NAMES

RANK = 4

LORA_NAMES = {kind: f"tiny_lora_{kind}.safetensors" for kind in CHECKPOINT_NAMES}
"""File name for each kind of checkpoint, in the `loras` folder: what `LoraLoaderModelOnly` is given."""


def write_tiny_loras(models_dir: Path) -> None:
    """Write a LoRA for each checkpoint below `models_dir`/checkpoints into `models_dir`/loras."""
    folder = models_dir / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in CHECKPOINT_NAMES.items():
        tensors = {}
        with safe_open(models_dir / "checkpoints" / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                if not key.endswith(".attn2.to_k.weight"):
                    continue
                width, context_width = file.get_slice(key).get_shape()
                layer = key.removeprefix("model.").removesuffix(".weight")
                for part, shape in (("up", (width, RANK)), ("down", (RANK, context_width))):
                    weight = f"{layer}.lora_{part}.weight"
                    tensors[weight] = recipe.weight(0, weight, shape)
        save_file(tensors, folder / LORA_NAMES[kind])
