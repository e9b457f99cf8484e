"""The step of the run, for every kind of sampler, and the four scales that follow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes.sampling import (
    Conditioning,
    ModelCall,
    apply,
    assert_rows,
    noise,
    person,
    prompt,
    record,
    rescale,
    run_guider,
    same_states,
    sample,
    unet,
)

KIND = "sd15"

# Model calls per step as the samplers are written: the second evaluation of a second-order step belongs to that step.
# The last step goes to noise level 0, where second-order samplers take one evaluation.
ONE = [0, 1, 2, 3]
TWICE = [0, 0, 1, 1, 2, 2, 3]
STEPS = {
    "euler": ONE,
    "euler_ancestral": ONE,
    "ddim": ONE,
    "dpmpp_2m": ONE,
    "dpmpp_2m_sde": ONE,
    "dpmpp_3m_sde": ONE,
    "lms": ONE,
    "lcm": ONE,
    "ipndm": ONE,
    "deis": ONE,
    "res_multistep": ONE,
    "uni_pc": ONE,
    # The second evaluation is at the noise level where the next step starts.
    "heun": [0, 1, 1, 2, 2, 3, 3],
    "dpmpp_2s_ancestral": [0, 1, 1, 2, 2, 3, 3],
    "dpm_2": TWICE,
    "dpmpp_sde": TWICE,
}


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the samplers' own code
def test_step_of_each_model_call(sampler: str) -> None:
    model, calls = record(apply(unet(KIND), KIND, person(KIND)))
    sample(model, prompt(KIND, "positive"), prompt(KIND, "negative"), sampler=sampler, steps=4)
    assert [call.step() for call in calls] == STEPS[sampler]


def adapter_scales(calls: list[ModelCall]) -> list[float]:
    """The scale in force at each model call."""
    return [round(float(acting.scale), 4) for call in calls for acting in call.own.decoupled]


def scheduled(early_fraction: float, weight: float = 1.0) -> tuple[Any, list[ModelCall]]:
    applied = apply(unet(KIND), KIND, person(KIND), weight)
    return record(rescale(applied, adapter_early=0.25, adapter_late=1.5, early_fraction=early_fraction))


@pytest.mark.parametrize(
    ("steps", "fraction", "early"), [(30, 0.1667, 5), (4, 0.25, 1), (4, 0.0, 0), (4, 1.0, 4), (6, 0.1667, 1)]
)
def test_early_steps(steps: int, fraction: float, early: int) -> None:
    model, calls = scheduled(fraction, weight=2.0)
    options: dict[str, Any] = {"latent_noise": noise(1, 4, 4), "cfg": 1.0, "steps": steps}
    sample(model, prompt(KIND, "positive"), prompt(KIND, "negative"), **options)
    assert adapter_scales(calls) == [0.5] * early + [3.0] * (steps - early)


def test_residual_has_the_norm_that_the_schedule_says() -> None:
    """Weight 1, whatever the length of the tokens: the norm of what is added is a multiple of the text's."""
    model, calls = scheduled(0.5)
    sample(model, prompt(KIND, "positive"), prompt(KIND, "negative"), steps=2, latent_noise=noise(2))
    for call, scale in zip(calls, (0.25, 1.5), strict=True):
        for site in call.sites.values():
            text = site.text
            ratio = (site.out - text).flatten(1).norm(dim=1) / text.flatten(1).norm(dim=1)
            torch.testing.assert_close(ratio, torch.full_like(ratio, scale), rtol=1e-4, atol=1e-4)


def test_advanced_sampler_counts_the_steps_it_runs() -> None:
    model, calls = scheduled(0.5)
    arguments = (model, prompt(KIND, "positive"), prompt(KIND, "negative"))
    half = sample(*arguments, steps=4, cfg=1.0, last_step=2, force_full_denoise=False)
    assert [call.step() for call in calls] == [0, 1]
    assert adapter_scales(calls) == [0.25, 1.5]
    calls.clear()
    sample(*arguments, steps=4, cfg=1.0, start_step=2, disable_noise=True, latent_noise=half * 0)
    assert [call.step() for call in calls] == [0, 1]
    assert adapter_scales(calls) == [0.25, 1.5]


def test_split_at_a_step_is_the_whole_run() -> None:
    """Without a schedule, sampling in two parts with the leftover noise gives the same picture."""
    from nodes import KSamplerAdvanced

    model = apply(unet(KIND), KIND, person(KIND), 1.0, 0.0, 0.6)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}

    def run(start: int, end: int, source: dict[str, Any], first: bool, last: bool) -> dict[str, Any]:
        with torch.inference_mode():
            result: dict[str, Any] = KSamplerAdvanced().sample(
                model,
                "enable" if first else "disable",
                3,
                4,
                4.0,
                "euler",
                "normal",
                prompt(KIND, "positive"),
                prompt(KIND, "negative"),
                source,
                start,
                end,
                "disable" if last else "enable",
            )[0]
        return result

    whole = run(0, 4, latent, True, True)["samples"]
    parts = run(2, 4, run(0, 2, latent, True, False), False, True)["samples"]
    assert (whole - parts).norm() < 1e-4 * whole.norm()


def test_partial_denoising_counts_its_own_steps() -> None:
    model, calls = scheduled(0.5)
    sample(model, prompt(KIND, "positive"), prompt(KIND, "negative"), steps=4, cfg=1.0, denoise=0.5)
    assert [call.step() for call in calls] == ONE
    assert adapter_scales(calls) == [0.25, 0.25, 1.5, 1.5]
    assert calls[0].sigma < unet(KIND).get_model_object("model_sampling").percent_to_sigma(0.4)


def identity_prompt(name: str = "positive") -> Conditioning:
    """A conditioning with identity text tokens at positions 1..3, as ID Prompt leaves it."""
    from ComfyUI_IDAdapter.nodes.host.conditioning import TEXT_POSITIONS

    return prompt(KIND, name, **{TEXT_POSITIONS: (1, 2, 3)})


def scaled_states(conditioning: Conditioning, scale: float) -> Tensor:
    states: Tensor = conditioning[0][0].clone()
    states[:, 1:4] *= scale
    return states


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_text_tokens_are_scaled_in_the_same_steps(sampler: str) -> None:
    positive, negative = identity_prompt(), prompt(KIND, "negative")
    before = positive[0][0].clone()
    model, calls = record(
        rescale(
            apply(unet(KIND), KIND, person(KIND)),
            adapter_early=0.25,
            text_early=0.5,
            text_late=1.75,
        )
    )
    sample(model, positive, negative, sampler=sampler, steps=4)
    scales = {0.25: 0.5, 1.0: 1.75}
    for call in calls:
        adapter_scale = adapter_scales([call])[0]
        rows = list(call.context)
        assert any(torch.equal(row, scaled_states(positive, scales[adapter_scale])[0]) for row in rows)
        assert any(same_states(row, negative) for row in rows)
    assert len({adapter_scales([call])[0] for call in calls}) == 2
    assert torch.equal(positive[0][0], before)


def test_text_tokens_without_an_adapter() -> None:
    """Rescaling works on ID Prompt alone (the text branch without Apply ID Adapter)."""
    positive, negative = identity_prompt(), prompt(KIND, "negative")
    model, calls = record(rescale(unet(KIND), text_early=0.5, text_late=1.75))
    sample(model, positive, negative, steps=2)
    for call, scale in zip(calls, (0.5, 1.75), strict=True):
        assert sum(torch.equal(row, scaled_states(positive, scale)[0]) for row in call.context) == 1


def test_text_tokens_stay_where_rescaling_is_absent_or_off() -> None:
    positive, negative = identity_prompt(), prompt(KIND, "negative")
    applied = apply(unet(KIND), KIND, person(KIND))
    for changed in (applied, rescale(applied, mode="off", text_early=0.5, text_late=0.5), unet(KIND)):
        model, calls = record(changed)
        sample(model, positive, negative, steps=2)
        for call in calls:
            assert sum(same_states(row, positive) for row in call.context) == 1


def test_rescaling_that_is_off_is_none() -> None:
    identity = person(KIND)
    plain = apply(unet(KIND), KIND, identity)
    off = rescale(rescale(plain, adapter_late=2.0), mode="off")
    arguments = (prompt(KIND, "positive"), prompt(KIND, "negative"))
    assert torch.equal(sample(off, *arguments), sample(plain, *arguments))


def test_controlnet_sees_the_scaled_text() -> None:
    """The ControlNet is given what the UNet is given, not the tokens before scaling."""
    seen: list[Tensor] = []

    class Control:
        """The part of a ControlNet that ComfyUI calls while it samples."""

        multigpu_clones: dict[Any, Any] = {}  # noqa: RUF012
        previous_controlnet = None
        extra_hooks = None

        def get_control(
            self, x: Tensor, t: Tensor, cond: dict[str, Any], batched: int, options: Any
        ) -> dict[str, Any]:
            seen.append(cond["c_crossattn"].clone())
            return {}

        def pre_run(self, *_: Any) -> None: ...

        def cleanup(self) -> None: ...

        def get_models(self) -> list[Any]:
            return []

        def get_extra_hooks(self) -> list[Any]:
            return []

        def inference_memory_requirements(self, _: Any) -> int:
            return 0

    control = Control()
    positive = identity_prompt()
    positive[0][1]["control"] = control
    negative = prompt(KIND, "negative", control=control)
    model = rescale(apply(unet(KIND), KIND, person(KIND)), text_early=0.5, text_late=1.75)
    sample(model, positive, negative, steps=2)
    for rows, scale in zip(seen, (0.5, 1.75), strict=True):
        assert sum(torch.equal(row, scaled_states(positive, scale)[0]) for row in rows) == 1
        assert sum(same_states(row, negative) for row in rows) == 1


def test_negative_made_up_for_an_area_is_not_scaled() -> None:
    from nodes import ConditioningSetArea

    negative, identity = prompt(KIND, "negative"), person(KIND)
    area = ConditioningSetArea().append(identity_prompt("other"), 64, 64, 64, 0, 1.0)[0]
    model, calls = record(rescale(apply(unet(KIND), KIND, identity), text_early=0.5, text_late=1.75))
    sample(model, prompt(KIND, "positive") + area, negative, latent_noise=noise(1, 8, 16), steps=1)
    (call,) = [call for call in calls if call.latent.shape[-1] == 8]
    assert sum(same_states(row, negative) for row in call.context) == 1
    assert sum(torch.equal(row, scaled_states(area, 1.75)[0]) for row in call.context) == 1


def test_middle_prompt_of_dual_cfg_is_scaled_by_its_own_tokens() -> None:
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    positive, middle, negative = identity_prompt(), prompt(KIND, "other"), prompt(KIND, "negative")
    identity = person(KIND)
    model, calls = record(rescale(apply(unet(KIND), KIND, identity), text_early=0.5, text_late=1.75))
    run_guider(DualCFGGuider.execute(model, positive, middle, negative, 5.0, 3.0, "regular").result[0])
    for call, scale in zip(calls, (0.5, 1.75), strict=True):
        expected = [scaled_states(positive, scale), middle[0][0], negative[0][0]]
        for states in expected:
            assert sum(torch.equal(row, states[0]) for row in call.context) == 1


def test_values_that_are_no_scales_are_refused() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    with pytest.raises(InputError, match="text_late must be a finite number, got nan"):
        rescale(unet(KIND), text_late=float("nan"))
    with pytest.raises(InputError, match="early_fraction must be between 0 and 1, got 1.5"):
        rescale(unet(KIND), early_fraction=1.5)


def test_conditioning_without_a_run_is_left_alone() -> None:
    """PerpNeg's older node samples a conditioning of its own that never was in the guider."""
    from comfy_extras.nodes_perpneg import PerpNeg

    identity, positive, negative = person(KIND), identity_prompt(), prompt(KIND, "negative")
    model = rescale(apply(unet(KIND), KIND, identity), adapter_late=1.0)
    model, calls = record(PerpNeg.execute(model, prompt(KIND, "other"), 1.0).result[0])
    assert sample(model, positive, negative, steps=1).isfinite().all()
    (own,) = [call for call in calls if call.context.shape[0] == 1]
    assert same_states(own.context[0], prompt(KIND, "other"))
    assert own.own is None
    assert own.sites == {}


def test_unscaled_run_matches_the_reference() -> None:
    """Scale 1 without normalisation is the residual as trained: checked against attention written out in the test."""
    identity = person(KIND)
    model, calls = record(rescale(apply(unet(KIND), KIND, identity), mode="off"))
    sample(model, prompt(KIND, "positive"), prompt(KIND, "negative"), steps=1, cfg=1.0)
    assert_rows(KIND, calls[0], [(prompt(KIND, "positive"), identity.adapter_tokens)])


def test_every_scheduler_of_the_host_gives_its_own_steps() -> None:
    """Dense schedules too: the tolerance for rounding must not reach the next level."""
    import comfy.samplers
    from ComfyUI_IDAdapter.idadapter_core.schedule import step_index

    sampling = unet("sd15").get_model_object("model_sampling")
    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        for steps in (4, 30, 100):
            sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).tolist()
            found = [step_index(sigma, sigmas) for sigma in sigmas[:-1]]
            assert found == list(range(len(sigmas) - 1)), (scheduler, steps)
