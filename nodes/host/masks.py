"""Masks of identities at the resolution of each layer, for each row of a model call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...idadapter_core.errors import InputError
from .plan import Application
from .rows import Row
from .run import Cache, Run


class Masks(Cache):
    """Cache of a run's application masks, one per resolution."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._masks: dict[Any, Tensor] = {}

    def of(
        self,
        application: int,
        rows: tuple[Row, ...],
        size: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return the mask (1 or rows, h * w, 1) of an application for these rows at attention resolution (h, w)."""
        mask = self.run.plan.applications[application].mask
        if mask is None:
            return None
        views = tuple((row.area, row.image % mask.shape[0]) for row in rows)
        if len(set(views)) == 1:
            views = views[:1]
        key = (application, views, size, self.run.current_size, device, dtype)
        if key not in self._masks:
            self._masks[key] = torch.stack([self._view(mask, *view, size) for view in views]).to(
                device, dtype
            )
        return self._masks[key]

    def _view(self, mask: Tensor, area: tuple[int, ...] | None, image: int, size: tuple[int, int]) -> Tensor:
        view = mask[image][None, None]
        if area is not None:
            height, width, y, x = area
            view = F.interpolate(view, self.run.current_size, mode="area")
            view = view[..., y : y + height, x : x + width]
        # Area mode gives the covered share of each token, so a hard edge does not leak into the next token.
        view = F.interpolate(view, size, mode="area")
        return view.flatten()[:, None]


def tokens_size(extra: Mapping[str, Any], count: int, latent_size: Sequence[int]) -> tuple[int, int]:
    """Return (h, w) of the image tokens in a block, from its options or, if another node's block does not pass them, by count.

    Raises:
        InputError: repeated halving of the latent never gives this number of tokens.
    """
    if (shape := extra.get("activations_shape")) is not None:
        return int(shape[-2]), int(shape[-1])
    height, width = latent_size
    while True:
        if height * width == count:
            return height, width
        if height * width < count or height * width == 1:
            raise InputError(
                f"attn_mask cannot be laid on {count} image tokens: another node's block does not name their height and width, and "
                f"no halving of a latent of {latent_size[0]} x {latent_size[1]} has as many. Sample without that node, or without the mask."
            )
        height, width = -(-height // 2), -(-width // 2)


def require_whole_pictures(
    run: Run, rows: tuple[Row, ...], x: Tensor, application: Application, windowed: bool
) -> None:
    """Raise InputError if a mask cannot be aligned with the rows of a model call.

    Args:
        windowed: whether `Row.image` is known to be the index of the latent in the whole batch.
    """
    (height, width), now, size = run.latent_size, run.current_size, tuple(x.shape[-2:])
    reason = None
    if abs(now[0] * width - now[1] * height) > max(height, width):
        reason = f"a sampler that changes the shape of the latent, here from {height} x {width} to {now[0]} x {now[1]}"
    elif len(rows) != x.shape[0] or any(size != (row.area or now)[:2] for row in rows):
        reason = (
            "the tiles that another node cuts this model call into, because it does not say where they lie"
        )
    elif application.masks > 1 and not windowed and max(row.image for row in rows) + 1 != run.latents:
        reason = (
            f"the tiles or windows that another node cuts the batch of {run.latents} latents into, because it does not say which they hold "
            "(one mask for all of them can)"
        )
    if reason is not None:
        raise InputError(
            f"{application.title}: attn_mask cannot follow {reason}. Sample without that node, or without the mask."
        )
