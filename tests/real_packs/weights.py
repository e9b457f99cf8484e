"""Model files of other packs with random weights, in the layouts of the published ones and of the right shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.golden import recipe

Block = tuple[str, int]
_SD15_BLOCKS: list[Block] = [
    *(("input", number) for number in (1, 2, 4, 5, 7, 8)),
    *(("output", number) for number in range(3, 12)),
    ("middle", 0),
]
_SDXL_BLOCKS: list[Block] = [
    *(("input", number) for number in (4, 4, 5, 5)),
    *(("input", number) for number in (7, 8) for _ in range(10)),
    *(("output", number) for number in (0, 1, 2) for _ in range(10)),
    *(("output", number) for number in (3, 3, 4, 4, 5, 5)),
    *(("middle", 0) for _ in range(10)),
]
IMAGE_WIDTH = 48  # of the CLIP vision embeddings that the IPAdapter file is made for
SDXL_CONTEXT = 2048  # by which these packs tell SDXL


def _keys_values(blocks: Sequence[Block], widths: dict[Block, int], context: int) -> dict[str, Tensor]:
    """K and V projections as these packs number them; blocks that the UNet lacks get some width."""
    return {
        f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight": recipe.weight(
            3, f"{number}.{part}", (widths.get(block, 32), context)
        )
        for number, block in enumerate(blocks)
        for part in "kv"
    }


def write_ipadapter(file: Path, kind: str, widths: dict[Block, int]) -> None:
    """An IPAdapter of the plain kind ("sd15" or "sdxl"): four tokens from a projected embedding."""
    context = 64 if kind == "sd15" else SDXL_CONTEXT
    blocks = _SD15_BLOCKS if kind == "sd15" else _SDXL_BLOCKS
    state = {
        "image_proj.proj.weight": recipe.weight(3, "proj.weight", (4 * context, IMAGE_WIDTH)),
        "image_proj.proj.bias": recipe.weight(3, "proj.bias", (4 * context,)),
        "image_proj.norm.weight": recipe.weight(3, "norm.weight", (context,)),
        "image_proj.norm.bias": recipe.weight(3, "norm.bias", (context,)),
        **_keys_values(blocks, widths, context),
    }
    _save(file, state)


def write_face_adapter(file: Path, encoder: torch.nn.Module, widths: dict[Block, int]) -> None:
    """A file of InstantID or PuLID: their own encoder, as it is initialised, and the projections of SDXL."""
    state = {f"image_proj.{key}": tensor for key, tensor in encoder.state_dict().items()}
    _save(file, {**state, **_keys_values(_SDXL_BLOCKS, widths, SDXL_CONTEXT)})


def _save(file: Path, state: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
