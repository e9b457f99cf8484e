"""Identity tokens for UniID in a diffusers UNet."""

from __future__ import annotations

from torch import Tensor

from tests.golden import recipe
from tests.tiny.uniid import CONFIGS

COUNT = 5  # identity tokens


def tokens(rows: int = 1, kind: str = "sd15", name: str = "person") -> Tensor:
    return recipe.value(0, f"unet.{name}", (rows, COUNT, CONFIGS[kind].context_width))
