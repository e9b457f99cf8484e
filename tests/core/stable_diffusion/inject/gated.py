"""Identity tokens and their bias for IDAdapter in a diffusers UNet."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.golden import recipe
from tests.tiny.idadapter import CONFIGS

COUNT = 5  # identity tokens


def tokens(rows: int = 1, name: str = "person") -> Tensor:
    shape = (rows, COUNT, CONFIGS["sd15"].vision_width)
    return recipe.value(0, f"unet.{name}", shape)


def bias() -> Tensor:
    return torch.linspace(-1, 1, COUNT)
