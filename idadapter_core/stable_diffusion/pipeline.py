"""Pictures outside ComfyUI: a base model, an adapter, an identity, a prompt. What the trainer shows and evaluation measures.

The same seed gives the picture that ComfyUI gives with KSampler (euler, simple) and the nodes of this pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import InputError
from ..faces.images import Image
from ..prompts import CLASS_WORD
from ..schedule import RescaleSchedule
from ..types import Identity
from .base import Base
from .inject import inject
from .inject.text import with_identity
from .sampler import sample
from .text import Conditioning

BeforeStep = Callable[[int, int], Conditioning | None]


@dataclass(frozen=True)
class Acting:
    """How an identity acts in a picture."""

    adapter: float = 1.0  # as `weight` of Apply ID Adapter; 0: not in the UNet
    text: float = (
        1.0  # as `token_weight` of ID Prompt; 0: not in the prompt. An identity word is there (1) or not (0)
    )
    rescale: RescaleSchedule | None = None  # normalized rescaling, with scales of its own in place of both


class Pipeline:
    """A base model with an adapter in it.

    Args:
        adapter: its layers are moved to the base's device; None draws with the base alone.
        injected: the adapter's injection, where it is in the UNet already.
        look: called before each step of the sampler; what it raises ends the drawing.
    """

    def __init__(
        self,
        base: Base,
        adapter: Adapter | None = None,
        injected: Any = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.base, self.adapter = base, adapter
        self._look = look
        self._device = next(base.unet.parameters()).device
        self._owns = injected is None
        self.injected = injected
        if adapter is not None:
            adapter.encoder.to(self._device)
            if injected is None and adapter.config.has_adapter_branch:
                adapter.layers.to(self._device)
                self.injected = inject(base.unet, adapter)

    def close(self) -> None:
        """Leave the UNet as it was."""
        if self._owns and self.injected is not None:
            self.injected.eject()

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        identity: Identity | None = None,
        seed: int = 0,
        steps: int = 20,
        cfg: float = 5.0,
        width: int = 512,
        height: int = 512,
        negative: str = "",
        acting: Acting | None = None,
    ) -> Tensor:
        """A picture (3, height, width), RGB in 0..1.

        Args:
            prompt: may hold `<class word>`. An identity word is added to it where it is missing.
            identity: made by this adapter; None: nobody, and the adapter does nothing at all.

        Raises:
            InputError: an identity without an adapter, or a way of acting that the method has not.
            MismatchError: the identity is of another adapter.
        """
        acting = acting or Acting()
        negatives = None if cfg == 1 else self.base.text.encode([negative])
        rows = torch.tensor([True] if negatives is None else [False, True])  # as `sample` calls the UNet
        before_step: BeforeStep = _nothing
        if identity is None:
            positive = self.base.text.encode([prompt.replace(CLASS_WORD, "person")])
            self._set(None, 0.0)
        else:
            if self.adapter is None:
                raise InputError("an identity was given, but no adapter; give the adapter that made it")
            self.adapter.require_identity(identity, "the identity")
            text = prompt.replace(CLASS_WORD, identity.class_word or "person")
            positive, before_step = self._with_identity(self.adapter, text, identity, acting, rows)
        own = before_step

        def each_step(step: int, steps: int) -> Conditioning | None:
            self._look()
            return own(step, steps)

        latents = sample(
            self.base,
            positive,
            negatives,
            seed=seed,
            steps=steps,
            cfg=cfg,
            width=width,
            height=height,
            before_step=each_step,
        )
        self._set(None, 0.0)
        picture = self.base.vae.decode(latents.float())[0]
        return ((picture + 1) / 2).clamp(0, 1).cpu()

    def _set(self, tokens: Tensor | None, strength: float, **more: Any) -> None:
        if self.injected is not None:
            self.injected.set_identity(tokens, strength, **more)

    def _with_identity(
        self, adapter: Adapter, text: str, identity: Identity, acting: Acting, rows: Tensor
    ) -> tuple[Conditioning, BeforeStep]:
        """The first conditioning, and what is set before each step.

        Rows of negative prompts have the identity's unconditional tokens, or are left alone where it has none.
        """
        kind, schedule = adapter.mechanisms.text, acting.rescale
        can_rescale = adapter.mechanisms.decoupled is not None or kind == "states"
        if (schedule is not None and not can_rescale) or (kind == "word" and acting.text not in (0, 1)):
            raise InputError(
                f"an {adapter.kind.title} acts with text 0 or 1 and without rescaling, got text {acting.text} and rescale {acting.rescale}"
            )
        conditioned = with_identity(
            self.base.text, text, kind, identity.text_tokens, identity.class_word, acting.text
        )
        more: dict[str, Any] = {}
        if identity.adapter_tokens is not None:
            bias = None if identity.adapter_bias is None else identity.adapter_bias[0]
            more = {"bias": bias, "rows": rows, "unconditional": identity.adapter_tokens_uncond}

        def before_step(step: int, steps: int) -> Conditioning | None:
            if schedule is None:
                return None
            strength = acting.adapter * schedule.adapter_scale(step, steps)
            self._set(identity.adapter_tokens, strength, rescale=True, **more)
            return conditioned(schedule.text_scale(step, steps))

        self._set(identity.adapter_tokens, acting.adapter, **more)
        return conditioned(1.0), before_step


def _nothing(step: int, steps: int) -> None:
    return None


def to_levels(picture: Tensor, precision: str = "no", setting: str = "train.mixed_precision") -> Image:
    """A picture (3, H, W) in 0..1 as (H, W, 3) uint8.

    Args:
        precision: that it was drawn in, as the configuration has it under `setting`.

    Raises:
        InputError: it has values that are not finite.
    """
    pixels = picture.detach().float().movedim(0, -1)
    if not torch.isfinite(pixels).all():
        advice = "lower the adapter's scale, or see whether the base model alone draws a picture"
        if precision != "no":
            advice = f'set {setting} = "no", for this model may not stand {precision}; else {advice}'
        raise InputError(f"a generated picture has values that are not finite: {advice}")
    return (pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()
