"""The diffusion process of the base models: noise levels, training targets, and the clean image implied by a prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

LATENT_LIMIT = 10.0  # for predicted clean latents: about three times the values of real images


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha-bar of each training timestep, and the prediction type of the UNet."""

    alphas_cumprod: Tensor  # (T,) alpha-bar, fp32, decreasing
    prediction_type: str  # "epsilon" or "v_prediction"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"prediction_type must be epsilon or v_prediction, got {self.prediction_type!r}"
            )
        if self.prediction_type == "epsilon" and float(self.alphas_cumprod[-1]) <= 0:
            raise ConfigError(
                "a schedule whose last noise level holds no signal (zero terminal SNR) cannot be used with epsilon prediction: "
                "the noise would be predicted from itself. Set base.prediction_type to v_prediction, if the model was trained so."
            )

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha-bar) and sqrt(1 - alpha-bar) for timesteps (B,), shaped to multiply `like` (B, ...)."""
        alpha = self.alphas_cumprod.to(like.device)[timesteps].float().reshape(-1, *([1] * (like.ndim - 1)))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t (B, C, H, W) for clean latents."""
        signal, spread = self.at(timesteps, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target of the UNet."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self.at(timesteps, clean)
        return signal * noise - spread * clean

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """Return x0_hat, the clean latents implied by a prediction, clamped to LATENT_LIMIT.

        With epsilon the error of the prediction is divided by sqrt(alpha-bar), so it explodes at high noise; v needs no division.
        """
        signal, spread = self.at(timesteps, noisy)
        if self.prediction_type == "epsilon":
            return ((noisy - spread * prediction) / signal).clamp(-LATENT_LIMIT, LATENT_LIMIT)
        return (signal * noisy - spread * prediction).clamp(-LATENT_LIMIT, LATENT_LIMIT)

    def less_noise(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """Return the latents at the timesteps `following` (B,) by a deterministic DDIM step (arXiv 2010.02502)."""
        clean = self.clean(noisy, prediction, timesteps)
        signal, spread = self.at(timesteps, noisy)
        return self.add_noise(clean, (noisy - signal * clean) / spread, following)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights (B,) of min-SNR (arXiv 2303.09556); 1 for gamma = 0."""
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps].float()
        if gamma == 0:
            return torch.ones_like(alpha)
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=gamma)
        # For v, min(snr, gamma) / (snr + 1) stays finite at zero SNR.
        return weight / (snr + 1 if self.prediction_type == "v_prediction" else snr)


def scaled_linear(
    prediction_type: str, steps: int = 1000, start: float = 0.00085, end: float = 0.012
) -> NoiseSchedule:
    """Return the schedule of Stable Diffusion 1, 2 and XL."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return NoiseSchedule((1 - betas).cumprod(0).float(), prediction_type)
