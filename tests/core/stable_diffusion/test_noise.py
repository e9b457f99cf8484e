"""The noise schedule: what is predicted, what a prediction means, and how samples weigh."""

from __future__ import annotations

import pytest
import torch

from idadapter_core.errors import ConfigError
from idadapter_core.stable_diffusion.noise import LATENT_LIMIT, NoiseSchedule, scaled_linear
from tests.golden import recipe

CLEAN, NOISE = recipe.value(1, "clean", (6, 4, 8, 8)), recipe.value(1, "noise", (6, 4, 8, 8))
STEPS = torch.tensor([0, 1, 250, 500, 800, 999])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_means_the_clean_image(prediction: str) -> None:
    schedule = scaled_linear(prediction)
    noisy, target = schedule.add_noise(CLEAN, NOISE, STEPS), schedule.target(CLEAN, NOISE, STEPS)
    torch.testing.assert_close(schedule.clean(noisy, target, STEPS), CLEAN, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_takes_noise_away(prediction: str) -> None:
    schedule = scaled_linear(prediction)
    following = torch.tensor([0, 0, 10, 499, 100, 300])
    noisy, target = schedule.add_noise(CLEAN, NOISE, STEPS), schedule.target(CLEAN, NOISE, STEPS)
    less = schedule.less_noise(noisy, target, STEPS, following)
    torch.testing.assert_close(less, schedule.add_noise(CLEAN, NOISE, following), atol=5e-3, rtol=1e-3)


def test_it_is_stable_diffusions_schedule() -> None:
    """alpha-bar of the published models: 0.9991 at the first step, 0.0047 at the last."""
    alphas = scaled_linear("epsilon").alphas_cumprod
    assert len(alphas) == 1000
    assert alphas[0] == pytest.approx(0.99915, abs=1e-5)
    assert alphas[-1] == pytest.approx(0.004660, abs=1e-5)
    assert (alphas.diff() < 0).all()


def test_it_is_diffusers_schedule() -> None:
    from tests.harness.shim import run_shim

    run_shim()
    from diffusers import DDPMScheduler

    for prediction in ("epsilon", "v_prediction"):
        theirs = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
        )
        ours = scaled_linear(prediction)
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.add_noise(CLEAN, NOISE, STEPS), theirs.add_noise(CLEAN, NOISE, STEPS))
    torch.testing.assert_close(ours.target(CLEAN, NOISE, STEPS), theirs.get_velocity(CLEAN, NOISE, STEPS))


def test_a_wild_prediction_stays_within_what_images_have() -> None:
    schedule = scaled_linear("epsilon")
    found = schedule.clean(CLEAN, 50 * NOISE, torch.full((6,), 999))
    assert found.abs().max() <= LATENT_LIMIT


def test_zero_terminal_snr_needs_v() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.0])
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        NoiseSchedule(alphas, "epsilon")
    schedule = NoiseSchedule(alphas, "v_prediction")
    last = torch.full((6,), 2)
    assert schedule.min_snr_weight(last, 5.0).isfinite().all()
    assert schedule.clean(NOISE, schedule.target(CLEAN, NOISE, last), last).isfinite().all()


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon or v_prediction, got 'sample'"):
        NoiseSchedule(torch.tensor([0.5]), "sample")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction: str) -> None:
    schedule = scaled_linear(prediction)
    assert torch.equal(schedule.min_snr_weight(STEPS, 0.0), torch.ones(6))
    alpha = schedule.alphas_cumprod[STEPS].double()
    snr = alpha / (1 - alpha)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(schedule.min_snr_weight(STEPS, 5.0).double(), expected, rtol=1e-4, atol=1e-6)
