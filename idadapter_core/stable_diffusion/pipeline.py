"""Pictures outside ComfyUI: a base model, an adapter, an identity, a prompt. What the trainer shows and evaluation measures.

The same seed gives the picture that ComfyUI gives with KSampler (euler, simple) and the nodes of this pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Adapter
from ..errors import InputError
from ..faces.images import Image
from ..methods import idadapter, uniid
from ..prompts import CLASS_WORD
from ..schedule import RescaleSchedule
from ..types import Identity
from .base import Base
from .inject import inject
from .sampler import sample
from .text import Conditioning, insert_tokens

BeforeStep = Callable[[int, int], Conditioning | None]


@dataclass(frozen=True)
class Acting:
    """How an identity acts in a picture."""

    adapter: float = 1.0  # as `weight` of Apply ID Adapter; 0: not in the UNet
    text: float = (
        1.0  # as `token_weight` of ID Prompt; 0: not in the prompt. IDAdapter's word is there (1) or not (0)
    )
    rescale: RescaleSchedule | None = (
        None  # UniID: normalized rescaling, with scales of its own in place of both
    )


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
            prompt: may hold `<class word>`. IDAdapter's identity word is added to it where it is missing.
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
            if self.adapter.method == idadapter.METHOD:
                positive = self._with_word(text, identity, acting, rows)
            else:
                positive, before_step = self._with_tokens(text, identity, acting, rows)
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
            self.injected.set_identity(tokens, strength=strength, **more)

    def _with_word(self, text: str, identity: Identity, acting: Acting, rows: Tensor) -> Conditioning:
        if acting.rescale is not None or acting.text not in (0, 1):
            raise InputError(
                f"an IDAdapter acts with text 0 or 1 and without rescaling, got text {acting.text} and rescale {acting.rescale}"
            )
        assert identity.adapter_tokens is not None
        bias = None if identity.adapter_bias is None else identity.adapter_bias[0]
        if identity.adapter_tokens_uncond is None:
            self._set(identity.adapter_tokens, acting.adapter, bias=bias, rows=rows)
        else:
            self._set(_by_rows(_aligned(identity, self.adapter), rows), acting.adapter, bias=bias)
        if not acting.text or not identity.text_tokens:
            return self.base.text.encode([text])
        if not self.base.text.has_identifier(text):
            text = idadapter.with_identity_clause(text, identity.class_word or "person")
        return self.base.text.encode([text], identity.text_tokens)

    def _with_tokens(
        self, text: str, identity: Identity, acting: Acting, rows: Tensor
    ) -> tuple[Conditioning, BeforeStep]:
        plain = self.base.text.encode([text])
        tokens: Tensor | None = None
        if identity.adapter_tokens is not None:
            tokens = _by_rows(identity, rows)
        words: Tensor | None = None
        if identity.text_tokens:
            count = next(t.shape[1] for t in identity.text_tokens.values())
            if self.base.text.shortened(text, count) != text:
                raise InputError(
                    f"the prompt is too long for {count} identity tokens beside it; shorten it: {text}"
                )
            words = uniid.normalize_text_tokens(identity.text_tokens, self.base.text.reference_norms(count))

        def scaled(scale: float) -> Conditioning:
            if words is None or acting.text == 0:
                return plain
            return replace(plain, states=insert_tokens(plain.states, words * scale))

        def before_step(step: int, steps: int) -> Conditioning | None:
            schedule = acting.rescale
            if schedule is None:
                return None
            self._set(tokens, acting.adapter * schedule.adapter_scale(step, steps), rescale=True)
            return scaled(acting.text * schedule.text_scale(step, steps))

        self._set(tokens, acting.adapter)
        return scaled(acting.text), before_step


def _nothing(step: int, steps: int) -> None:
    return None


def _aligned(identity: Identity, adapter: Any) -> Identity:
    """An IDAdapter's identity whose unconditional tokens are as many as its own, so that its bias holds for both.

    Patch tokens of zeroed features are all alike, and the bias gives any number of photos the weight of N.
    """
    shown, zeroed = identity.adapter_tokens, identity.adapter_tokens_uncond
    assert shown is not None
    assert zeroed is not None
    count = shown.shape[1]
    if zeroed.shape[1] == count:
        return identity
    if adapter.config.tokens or (count - 1) % adapter.config.vision_patches:
        raise InputError(
            f"{adapter.name} has tokens for negative prompts, beside which only identities that were mixed in its own way can be drawn; "
            "set mode to auto."
        )
    same = torch.cat([zeroed[:, :1].expand(-1, count - 1, -1), zeroed[:, -1:]], dim=1)
    return replace(identity, adapter_tokens_uncond=same)


def _by_rows(identity: Identity, rows: Tensor) -> Tensor:
    """Tokens (rows, T, D): the identity's in positive rows, those of zeroed features in negative ones."""
    assert identity.adapter_tokens is not None
    assert identity.adapter_tokens_uncond is not None
    parts = [identity.adapter_tokens if keep else identity.adapter_tokens_uncond for keep in rows.tolist()]
    return torch.cat(parts)


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
