"""Image generation outside ComfyUI from a base model, an adapter, an identity and a prompt, for training samples and evaluation.

The same seed gives the same image as ComfyUI with KSampler (scheduler simple) and the nodes of this pack; with the sampler lcm on a CPU only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import InputError
from ..faces.images import Image
from ..identity import count_alike
from ..placeholders import CLASS_WORD
from ..schedule import RescaleSchedule
from ..types import Identity
from .base import Base
from .inject import inject
from .inject.text import with_identity
from .sampler import positive_rows, sample
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


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """An image of a batch.

    prompt: may contain `<class word>`. A missing identity word is appended.
    identity: an identity from the pipeline's adapter; None: no identity, and the adapter has no effect.
    """

    prompt: str
    identity: Identity | None = None
    seed: int = 0


class Pipeline:
    """A base model with an injected adapter.

    Args:
        adapter: its layers are moved to the base's device, and converted to the base's dtype unless that is narrower (an adapter's file may
            be in half precision, one in training is in single precision); None generates with the base alone.
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
        weight = next(base.unet.parameters())
        self._device = weight.device
        self._owns = injected is None
        self.injected = injected
        if adapter is not None:
            adapter.encoder.to(self._device)
            if injected is None and adapter.config.has_adapter_branch:
                layer = next(adapter.layers.parameters())
                is_wider = layer.dtype.itemsize > weight.dtype.itemsize
                adapter.layers.to(self._device, layer.dtype if is_wider else weight.dtype)
                self.injected = inject(base.unet, adapter)

    def close(self) -> None:
        """Eject the adapter and leave the UNet unchanged."""
        if self._owns and self.injected is not None:
            self.injected.eject()

    def generate(
        self, prompt: str, *, identity: Identity | None = None, seed: int = 0, **settings: Any
    ) -> Tensor:
        """Generate an image (3, height, width), RGB in 0..1. Settings and errors are those of `generate_batch`."""
        return self.generate_batch([ImageRequest(prompt, identity, seed)], **settings)[0]

    @torch.no_grad()
    def generate_batch(
        self,
        requests: Sequence[ImageRequest],
        *,
        steps: int = 20,
        cfg: float = 5.0,
        width: int = 512,
        height: int = 512,
        negative: str = "",
        strengths: Strengths | None = None,
        sampler: str = "euler",
    ) -> Tensor:
        """Generate images (B, 3, height, width), RGB in 0..1, in one batch. An image does not depend on the others, up to rounding.

        Raises:
            InputError: no requests, some with and some without an identity, identities of different numbers of photos, an identity
                without an adapter, `strengths` that the method does not support, or a sampler that is none of `sampler.SAMPLERS`.
            MismatchError: an identity was made with another adapter.
        """
        strengths = strengths or Strengths()
        if not requests:
            raise InputError("requests is empty; give at least one")
        negatives = None if cfg == 1 else self.base.text.encode([negative])
        rows = positive_rows(negatives, cfg, len(requests))
        before_step: BeforeStep = _no_action
        if all(request.identity is None for request in requests):
            prompts = [request.prompt.replace(CLASS_WORD, "person") for request in requests]
            positive = self.base.text.encode(prompts)
            self._set(None, 0.0)
        else:
            positive, before_step = self._with_identities(requests, strengths, rows)
        own = before_step

        def each_step(step: int, steps: int) -> Conditioning | None:
            self._poll()
            return own(step, steps)

        latents = sample(
            self.base,
            positive,
            negatives,
            seeds=[request.seed for request in requests],
            steps=steps,
            cfg=cfg,
            width=width,
            height=height,
            sampler=sampler,
            before_step=each_step,
        )
        self._set(None, 0.0)
        pictures = self.base.vae.decode(latents.float())
        return ((pictures + 1) / 2).clamp(0, 1).cpu()

    def _set(self, tokens: Tensor | None, strength: float, **more: Any) -> None:
        if self.injected is not None:
            self.injected.set_identity(tokens, strength, **more)

    def _with_identities(
        self, requests: Sequence[ImageRequest], strengths: Strengths, rows: Tensor
    ) -> tuple[Conditioning, BeforeStep]:
        """Return the first conditioning and the callback for each step.

        Rows of negative prompts get the identities' unconditional tokens or, if they have none, no tokens.
        """
        if self.adapter is None:
            raise InputError("an identity was given, but no adapter; give the adapter that made it")
        adapter = self.adapter
        kind, schedule = adapter.mechanisms.text, strengths.rescale
        can_rescale = adapter.mechanisms.decoupled is not None or kind == "states"
        if (schedule is not None and not can_rescale) or (kind == "word" and strengths.text not in (0, 1)):
            raise InputError(
                f"an {adapter.kind.title} acts with text 0 or 1 and without rescaling, got text {strengths.text} and rescale "
                f"{strengths.rescale}"
            )
        scaled: list[Callable[[float], Conditioning]] = []
        people: list[Identity] = []
        for request in requests:
            if (identity := request.identity) is None:
                raise InputError(
                    "some images of a batch have an identity and others have none; generate them apart"
                )
            adapter.require_identity(identity, "the identity")
            text = request.prompt.replace(CLASS_WORD, identity.class_word or "person")
            words, noun = identity.text_tokens, identity.class_word
            scaled.append(with_identity(self.base.text, text, kind, words, noun, strengths.text))
            people.append(identity)
        tokens, more = _tokens_of(people, rows)

        def conditioned(scale: float) -> Conditioning:
            return _together([one(scale) for one in scaled])

        def before_step(step: int, steps: int) -> Conditioning | None:
            if schedule is None:
                return None
            strength = strengths.adapter * schedule.adapter_scale(step, steps)
            self._set(tokens, strength, rescale=True, **more)
            return conditioned(schedule.text_scale(step, steps))

        self._set(tokens, strengths.adapter, **more)
        return conditioned(1.0), before_step


def _tokens_of(people: Sequence[Identity], rows: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Return tokens (1 or rows, T, D) for the rows of a call, and the other arguments of `Injected.set_identity`."""
    first = people[0]
    if first.adapter_tokens is None:
        return None, {}
    found = [person.adapter_tokens for person in people if person.adapter_tokens is not None]
    is_alike = all(count_alike(person, first) for person in people)
    if len({tokens.shape for tokens in found}) > 1 or len(found) < len(people) or not is_alike:
        raise InputError(
            "the identities of a batch have different numbers or weights of photos; generate their images apart"
        )
    tokens = first.adapter_tokens
    if len(people) > 1:  # values in rows without the identity are not read
        tokens = torch.cat(found).repeat(len(rows) // len(people), 1, 1)
    bias = None if first.adapter_bias is None else first.adapter_bias[0]
    return tokens, {"bias": bias, "rows": rows, "unconditional": first.adapter_tokens_uncond}


def _together(parts: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of one prompt each as rows of one."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


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
