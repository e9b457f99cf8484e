"""The sampler. That it draws ComfyUI's pictures is tested in `tests/nodes/test_training_parity.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.errors import InputError
from idadapter_core.stable_diffusion.base import Base, load_base
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.noise import scaled_linear
from idadapter_core.stable_diffusion.sampler import SAMPLERS, positive_rows, sample, simple_schedule
from idadapter_core.stable_diffusion.text import Conditioning
from tests.tiny.bases import KINDS, diffusers_base


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest) -> Base:
    kind = str(request.param)
    return load_base(BaseConfig(path=str(diffusers_base(kind)), family=kind))


def draw(
    base: Base, text: str = "a photo of a man", negative: str | None = "a cat", **options: Any
) -> Tensor:
    settings = {
        "seeds": (options.pop("seed", 1),),
        "steps": 3,
        "cfg": 3.0,
        "width": 40,
        "height": 24,
        **options,
    }
    unwanted = None if negative is None else base.text.encode([negative])
    return sample(base, base.text.encode([text]), unwanted, **settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_makes_the_picture(sampler: str, base: Base) -> None:
    one = draw(base, sampler=sampler)
    assert one.shape == (1, 4, 3, 5)
    assert one.dtype is torch.float32
    assert not one.requires_grad
    assert torch.equal(one, draw(base, sampler=sampler))
    assert not torch.allclose(one, draw(base, seed=2, sampler=sampler), atol=0.1)
    assert base.vae.decode(one).shape == (1, 3, 24, 40)


def test_both_prompts_count(base: Base) -> None:
    one = draw(base)
    assert (one - draw(base, text="a cat")).abs().max() > 1e-3
    assert (one - draw(base, negative="a man")).abs().max() > 1e-3


def test_without_guidance_the_negative_prompt_is_left_out(base: Base) -> None:
    expected = draw(base, negative=None)
    assert torch.equal(draw(base, cfg=1.0), expected)
    assert torch.equal(draw(base, negative=None, cfg=7.0), expected)
    assert (draw(base) - expected).abs().max() > 1e-3
    # The same prompt on both sides cancels out.
    torch.testing.assert_close(draw(base, negative="a photo of a man"), expected, atol=1e-3, rtol=0)


def test_rows(base: Base) -> None:
    positive, negative = base.text.encode(["a man"]), base.text.encode(["a cat"])
    for unwanted, cfg, rows in ((negative, 3.0, [False, True]), (negative, 1.0, [True]), (None, 3.0, [True])):
        assert positive_rows(unwanted, cfg).tolist() == rows
        seen: list[Tensor] = []
        handle = base.unet.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["encoder_hidden_states"]),
            with_kwargs=True,
        )
        sample(base, positive, unwanted, seeds=[0], steps=1, cfg=cfg, width=32, height=16)
        handle.remove()
        (states,) = seen
        assert len(states) == len(rows)
        for row, is_positive in zip(states, rows, strict=True):
            assert torch.equal(row, (positive if is_positive else negative).states[0])


def test_each_step_is_announced_and_may_have_a_prompt_of_its_own(base: Base) -> None:
    steps: list[tuple[int, int]] = []
    man, cat = base.text.encode(["a man"]), base.text.encode(["a cat"])

    def after(first: int) -> Any:
        def before_step(step: int, count: int) -> Conditioning | None:
            steps.append((step, count))
            return cat if step >= first else None

        return before_step

    never = draw(base, "a man", before_step=after(3))
    assert steps == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(never, draw(base, "a man"))
    assert torch.equal(draw(base, "a man", before_step=after(0)), draw(base, "a cat"))
    late = draw(base, "a man", before_step=after(2))
    assert (late - never).abs().max() > 1e-4
    assert not torch.equal(late, draw(base, "a cat"))
    assert man.states.shape == cat.states.shape


def test_in_half_precision(base: Base) -> None:
    folder = diffusers_base(base.family)
    narrow = load_base(BaseConfig(path=str(folder), family=base.family), dtype=torch.bfloat16)
    found, expected = draw(narrow), draw(base)
    assert found.dtype is torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_every_nth_timestep_from_the_last_one_on() -> None:
    timesteps, sigmas = simple_schedule(scaled_linear("epsilon"), 4)
    assert timesteps.tolist() == [999, 749, 499, 249]
    assert sigmas.shape == (5,)
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-3)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 44}, "multiples of 8, got 44x24"),
        ({"height": 0}, "multiples of 8, got 40x0"),
        ({"steps": 0}, "steps must be between 1 and 1000, got 0"),
        ({"steps": 1001}, "steps must be between 1 and 1000, got 1001"),
        ({"sampler": "ddim"}, "sampler must be one of euler, lcm, got 'ddim'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, base: Base) -> None:
    with pytest.raises(InputError, match=message):
        draw(base, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_a_batch_are_those_drawn_one_by_one(sampler: str, base: Base) -> None:
    texts, seeds = ["a man", "a cat", "a photo"], [5, 1, 5]
    encoded = [base.text.encode([text]) for text in texts]
    pooled = [one.pooled for one in encoded if one.pooled is not None]
    states = torch.cat([one.states for one in encoded])
    positive = Conditioning(states, torch.cat(pooled) if pooled else None)
    settings: dict[str, Any] = {"steps": 3, "cfg": 3.0, "width": 40, "height": 24, "sampler": sampler}
    negative = base.text.encode(["a cat"])
    together = sample(base, positive, negative, seeds=seeds, **settings)
    assert positive_rows(negative, 3.0, 3).tolist() == [False] * 3 + [True] * 3
    for number, seed in enumerate(seeds):
        alone = sample(base, encoded[number], negative, seeds=[seed], **settings)
        torch.testing.assert_close(together[number], alone[0], atol=2e-4 * float(alone.abs().max()), rtol=0)
    one_text = sample(base, encoded[0], negative, seeds=[5, 6], **settings)
    torch.testing.assert_close(one_text[0], together[0], atol=2e-4 * float(together.abs().max()), rtol=0)


def test_as_many_prompts_as_images(base: Base) -> None:
    with pytest.raises(InputError, match="the states of 1 prompt or of 3, got \\[2\\] rows"):
        sample(base, base.text.encode(["a", "b"]), None, seeds=[0, 1, 2], steps=1, cfg=1.0, width=8, height=8)
    with pytest.raises(InputError, match="seeds is empty"):
        sample(base, base.text.encode(["a"]), None, seeds=[], steps=1, cfg=1.0, width=8, height=8)
