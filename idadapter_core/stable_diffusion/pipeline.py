"""Image generation outside ComfyUI from a base model, an adapter, an identity and a prompt, for training samples and evaluation.

The same seed gives the same image as ComfyUI with KSampler (euler, simple) and the nodes of this pack.
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
from ..placeholders import CLASS_WORD
from ..schedule import RescaleSchedule
from ..types import Identity
from .base import Base
from .inject import inject
from .inject.text import with_identity
from .sampler import sample
from .text import Conditioning

BeforeStep = Callable[[int, int], Conditioning | None]


@dataclass(frozen=True)
class Strengths:
    """Strengths of an identity in an image."""

    adapter: float = 1.0  # as `weight` of Apply ID Adapter; 0: not in the UNet
    text: float = (
        1.0  # as `token_weight` of ID Prompt; 0: not in the prompt. For an identity word only 0 or 1
    )
    rescale: RescaleSchedule | None = None  # normalized rescaling, whose scales replace both strengths


class Pipeline:
    """A base model with an injected adapter.

    Args:
        adapter: its layers are moved to the base's device; None generates with the base alone.
        injected: the adapter's injection, if it is already in the UNet.
        poll: callback before each sampler step; it may raise to stop the generation.
    """

    def __init__(
        self,
        base: Base,
        adapter: Adapter | None = None,
        injected: Any = None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.base, self.adapter = base, adapter
        self._poll = poll
        self._device = next(base.unet.parameters()).device
        self._owns = injected is None
        self.injected = injected
        if adapter is not None:
            adapter.encoder.to(self._device)
            if injected is None and adapter.config.has_adapter_branch:
                adapter.layers.to(self._device)
                self.injected = inject(base.unet, adapter)

    def close(self) -> None:
        """Eject the adapter and leave the UNet unchanged."""
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
        strengths: Strengths | None = None,
    ) -> Tensor:
        """Generate an image (3, height, width), RGB in 0..1.

        Args:
            prompt: may contain `<class word>`. A missing identity word is appended.
            identity: an identity from this adapter; None: no identity, and the adapter has no effect.

        Raises:
            InputError: an identity without an adapter, or `strengths` settings that the method does not support.
            MismatchError: the identity was made with another adapter.
        """
        strengths = strengths or Strengths()
        negatives = None if cfg == 1 else self.base.text.encode([negative])
        rows = torch.tensor([True] if negatives is None else [False, True])  # row order of `sample`
        before_step: BeforeStep = _no_action
        if identity is None:
            positive = self.base.text.encode([prompt.replace(CLASS_WORD, "person")])
            self._set(None, 0.0)
        else:
            if self.adapter is None:
                raise InputError("an identity was given, but no adapter; give the adapter that made it")
            self.adapter.require_identity(identity, "the identity")
            text = prompt.replace(CLASS_WORD, identity.class_word or "person")
            positive, before_step = self._with_identity(self.adapter, text, identity, strengths, rows)
        own = before_step

        def each_step(step: int, steps: int) -> Conditioning | None:
            self._poll()
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
        self, adapter: Adapter, text: str, identity: Identity, strengths: Strengths, rows: Tensor
    ) -> tuple[Conditioning, BeforeStep]:
        """Return the first conditioning and the callback for each step.

        Rows of negative prompts get the identity's unconditional tokens or, if it has none, no tokens.
        """
        kind, schedule = adapter.mechanisms.text, strengths.rescale
        can_rescale = adapter.mechanisms.decoupled is not None or kind == "states"
        if (schedule is not None and not can_rescale) or (kind == "word" and strengths.text not in (0, 1)):
            raise InputError(
                f"an {adapter.kind.title} acts with text 0 or 1 and without rescaling, got text {strengths.text} and rescale {strengths.rescale}"
            )
        conditioned = with_identity(
            self.base.text, text, kind, identity.text_tokens, identity.class_word, strengths.text
        )
        more: dict[str, Any] = {}
        if identity.adapter_tokens is not None:
            bias = None if identity.adapter_bias is None else identity.adapter_bias[0]
            more = {"bias": bias, "rows": rows, "unconditional": identity.adapter_tokens_uncond}

        def before_step(step: int, steps: int) -> Conditioning | None:
            if schedule is None:
                return None
            strength = strengths.adapter * schedule.adapter_scale(step, steps)
            self._set(identity.adapter_tokens, strength, rescale=True, **more)
            return conditioned(schedule.text_scale(step, steps))

        self._set(identity.adapter_tokens, strengths.adapter, **more)
        return conditioned(1.0), before_step


def _no_action(step: int, steps: int) -> None:
    return None


def to_levels(picture: Tensor, precision: str = "no", setting: str = "train.mixed_precision") -> Image:
    """Convert an image (3, H, W) in 0..1 to (H, W, 3) uint8.

    Args:
        precision: precision of the generation, the value of `setting` in the configuration.

    Raises:
        InputError: the image has values that are not finite.
    """
    pixels = picture.detach().float().movedim(0, -1)
    if not torch.isfinite(pixels).all():
        advice = "lower the adapter's scale, or see whether the base model alone draws a picture"
        if precision != "no":
            advice = f'set {setting} = "no", for this model may not stand {precision}; else {advice}'
        raise InputError(f"a generated picture has values that are not finite: {advice}")
    return (pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()
