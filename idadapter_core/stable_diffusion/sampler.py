"""Sampling from a base model, equivalent to ComfyUI's KSampler with the sampler "euler" or "lcm" and the scheduler "simple"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Base
from .noise import NoiseSchedule
from .text import Conditioning

SAMPLERS = ("euler", "lcm")
"""Names of ComfyUI: straight steps between noise levels; or each prediction of the clean latents with new noise, for the next level."""
_LEAST_SIGNAL = 4.8973451890853435e-08  # alpha-bar used for zero signal, as in ComfyUI


def simple_schedule(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """Return timesteps (steps,) and noise levels sigma (steps + 1,), fp32, of ComfyUI's "simple": every n-th training timestep,
    starting from the last, then 0.

    Raises:
        InputError: no steps, or more than the model has timesteps.
    """
    if not 1 <= steps <= schedule.steps:
        raise InputError(f"steps must be between 1 and {schedule.steps}, got {steps}")
    stride = schedule.steps / steps
    timesteps = torch.tensor([schedule.steps - 1 - int(step * stride) for step in range(steps)])
    alphas = schedule.alphas_cumprod.cpu().double().clamp_min(_LEAST_SIGNAL)[timesteps]
    sigmas = ((1 - alphas) / alphas).sqrt().float()
    return timesteps, torch.cat([sigmas, sigmas.new_zeros(1)])


def positive_rows(negative: Conditioning | None, cfg: float, count: int = 1) -> Tensor:
    """Return the mask (rows,) bool of the positive rows in the UNet calls of `sample` for `count` images.

    The rows are the negative ones of all images, then the positive ones; only the latter without a negative prompt or if cfg is 1.
    """
    positive = torch.ones(count, dtype=torch.bool)
    return positive if negative is None or cfg == 1 else torch.cat([~positive, positive])


@torch.no_grad()
def sample(
    base: Base,
    positive: Conditioning,
    negative: Conditioning | None,
    *,
    seeds: Sequence[int],
    steps: int,
    cfg: float,
    width: int,
    height: int,
    sampler: str = "euler",
    before_step: Callable[[int, int], Conditioning | None] | None = None,
) -> Tensor:
    """Sample the latents of B images (B, C, height / 8, width / 8) in the UNet's units, fp32 on its device, for `Base.vae.decode`.

    The UNet is called once per step with the rows of `positive_rows`.

    Args:
        positive: conditioning of one prompt per image, or of one for all.
        negative: the same; None: no guidance, for any `cfg`.
        seeds: seed of the noise of each image, which is drawn on the CPU to match ComfyUI. An image depends on its own seed only.
        cfg: guidance scale; 1 omits the negative prompt.
        width, height: size of the image in pixels, multiples of 8. Also SDXL's original and target size.
        sampler: one of `SAMPLERS`.
        before_step: callback (step, steps) before each UNet call; steps count from 0. A conditioning it returns replaces the positive
            one for this step.

    Raises:
        InputError: sizes that are not multiples of 8, another number of prompts than images, an invalid number of steps, or an unknown
            sampler.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    factor = base.vae.factor
    if min(width, height) < factor or width % factor or height % factor:
        raise InputError(f"width and height must be multiples of {factor}, got {width}x{height}")
    if not seeds:
        raise InputError("seeds is empty; give one per image")
    negatives = [] if negative is None or cfg == 1 else [negative]
    count = len(seeds)
    unet, device = base.unet, base.unet.device
    timesteps, sigmas = simple_schedule(base.schedule, steps)
    shape = (1, unet.config.in_channels, height // factor, width // factor)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents: Tensor = noise.to(device) * float(sigmas[0].square() + 1) ** 0.5
    renewing = [torch.Generator().manual_seed(seed + 1) for seed in seeds]  # as ComfyUI on a CPU
    for step in range(steps):
        given = None if before_step is None else before_step(step, steps)
        prompts = [*negatives, given or positive]
        sigma = float(sigmas[step])
        total = (sigma**2 + 1) ** 0.5
        noisy = (latents / total).to(unet.dtype).repeat(len(prompts), 1, 1, 1)
        timestep = timesteps[step].to(device)
        conditions = _conditions(prompts, count, width, height, unet)
        prediction = unet(noisy, timestep, **conditions).sample.float()
        if base.schedule.prediction_type == "epsilon":
            clean = latents.repeat(len(prompts), 1, 1, 1) - sigma * prediction
        else:
            clean = latents.repeat(len(prompts), 1, 1, 1) / total**2 - prediction * sigma / total
        if negatives:
            without, with_text = clean.chunk(2)
            clean = without + (with_text - without) * cfg
        following = float(sigmas[step + 1])
        if sampler == "euler":
            latents = latents + (latents - clean) / sigma * (following - sigma)
        else:
            fresh = torch.cat([torch.randn(shape, generator=generator) for generator in renewing])
            latents = clean + following * fresh.to(device)
    return latents


def _conditions(
    prompts: list[Conditioning], count: int, width: int, height: int, unet: Any
) -> dict[str, Any]:
    """Return the UNet's conditioning arguments, `count` rows for each of the prompts. SDXL also gets the pooled text and (height, width,
    top, left, height, width)."""
    if any(prompt.states.shape[0] not in (1, count) for prompt in prompts):
        raise InputError(
            f"expected the states of 1 prompt or of {count}, got {[prompt.states.shape[0] for prompt in prompts]} rows"
        )

    def together(parts: list[Tensor]) -> Tensor:
        rows = [part.expand(count, *part.shape[1:]) for part in parts]
        return torch.cat([row.to(unet.device, unet.dtype) for row in rows])

    conditions: dict[str, Any] = {"encoder_hidden_states": together([prompt.states for prompt in prompts])}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    if pooled:
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=unet.device)
        added = {"text_embeds": together(pooled), "time_ids": sizes.expand(len(prompts) * count, -1)}
        conditions["added_cond_kwargs"] = added
    return conditions
