"""Sampling from a base model, equivalent to ComfyUI's KSampler with the sampler "euler" and the scheduler "simple"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Base
from .noise import NoiseSchedule
from .text import Conditioning

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


def positive_rows(negative: Conditioning | None, cfg: float) -> Tensor:
    """Return the mask (rows,) bool of the positive rows in the UNet calls of `sample`.

    There are two rows, negative then positive, or only the positive row if there is no negative prompt or cfg is 1.
    """
    return torch.tensor([True] if negative is None or cfg == 1 else [False, True])


@torch.no_grad()
def sample(
    base: Base,
    positive: Conditioning,
    negative: Conditioning | None,
    *,
    seed: int,
    steps: int,
    cfg: float,
    width: int,
    height: int,
    before_step: Callable[[int, int], Conditioning | None] | None = None,
) -> Tensor:
    """Sample the latents of one image (1, C, height / 8, width / 8) in the UNet's units, fp32 on its device, for `Base.vae.decode`.

    The UNet is called once per step with the rows of `positive_rows`: row 0 is the negative prompt and row 1 the positive, or the
    positive alone.

    Args:
        positive: conditioning of one prompt.
        negative: conditioning of one prompt; None: no guidance, for any `cfg`.
        seed: seed of the noise, which is drawn on the CPU to match ComfyUI.
        cfg: guidance scale; 1 omits the negative prompt.
        width, height: size of the image in pixels, multiples of 8. Also SDXL's original and target size.
        before_step: callback (step, steps) before each UNet call; steps count from 0. A conditioning it returns replaces the positive
            one for this step.

    Raises:
        InputError: sizes that are not multiples of 8, more than one prompt, or an invalid number of steps.
    """
    factor = base.vae.factor
    if min(width, height) < factor or width % factor or height % factor:
        raise InputError(f"width and height must be multiples of {factor}, got {width}x{height}")
    negatives = [] if negative is None or cfg == 1 else [negative]
    unet, device = base.unet, base.unet.device
    timesteps, sigmas = simple_schedule(base.schedule, steps)
    noise = torch.randn(
        (1, unet.config.in_channels, height // factor, width // factor),
        generator=torch.Generator().manual_seed(seed),
    )
    latents: Tensor = noise.to(device) * float(sigmas[0].square() + 1) ** 0.5
    for step in range(steps):
        given = None if before_step is None else before_step(step, steps)
        prompts = [*negatives, given or positive]
        sigma = float(sigmas[step])
        total = (sigma**2 + 1) ** 0.5
        noisy = (latents / total).to(unet.dtype).expand(len(prompts), -1, -1, -1)
        timestep = timesteps[step].to(device)
        conditions = _conditions(prompts, width, height, unet)
        prediction = unet(noisy, timestep, **conditions).sample.float()
        if base.schedule.prediction_type == "epsilon":
            clean = latents - sigma * prediction
        else:
            clean = latents / total**2 - prediction * sigma / total
        if negatives:
            clean = clean[:1] + (clean[1:] - clean[:1]) * cfg
        latents = latents + (latents - clean) / sigma * (float(sigmas[step + 1]) - sigma)
    return latents


def _conditions(prompts: list[Conditioning], width: int, height: int, unet: Any) -> dict[str, Any]:
    """Return the UNet's conditioning arguments for one prompt per row. SDXL also gets the pooled text and (height, width, top, left,
    height, width)."""
    if any(prompt.states.shape[0] != 1 for prompt in prompts):
        raise InputError(
            f"expected the states of one prompt, got {[prompt.states.shape[0] for prompt in prompts]} rows"
        )

    def together(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.to(unet.device, unet.dtype) for part in parts])

    conditions: dict[str, Any] = {"encoder_hidden_states": together([prompt.states for prompt in prompts])}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    if pooled:
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=unet.device)
        added = {"text_embeds": together(pooled), "time_ids": sizes.expand(len(prompts), -1)}
        conditions["added_cond_kwargs"] = added
    return conditions
