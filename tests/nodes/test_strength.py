"""Weight and window: when nothing acts, the picture is bit for bit that of the plain model."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.sampling import (
    KINDS,
    apply,
    assert_rows,
    difference,
    draw,
    person,
    prompt,
    record,
    rescale,
    unet,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    ("weight", "start", "end"), [(0.0, 0.0, 1.0), (1.0, 0.4, 0.4), (1.0, 0.0, 0.0), (1.0, 0.3, 0.6)]
)
def test_nothing_acts(kind: str, rescaled: bool, weight: float, start: float, end: float) -> None:
    # The two steps of the run are the first and the last noise level; the last window lies between them.
    model = apply(unet(kind), kind, person(kind), weight, start, end)
    assert torch.equal(draw(rescale(model) if rescaled else model, kind), draw(unet(kind), kind))


def test_rescaling_alone_changes_nothing() -> None:
    assert torch.equal(
        draw(rescale(unet("sdxl"), scope="every attention patch"), "sdxl"), draw(unet("sdxl"), "sdxl")
    )


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize("middle", [0.5, 0.3, 0.001])
def test_two_windows_that_meet_are_one(kind: str, middle: float) -> None:
    identity = person(kind)
    first = apply(unet(kind), kind, identity, 1.0, 0.0, middle)
    both = draw(apply(first, kind, identity, 1.0, middle, 1.0), kind, steps=4)
    whole = draw(apply(unet(kind), kind, identity), kind, steps=4)
    assert difference(both, whole) < 1e-5
    assert difference(draw(first, kind, steps=4), whole) > 1e-3


def test_windows_that_meet_on_a_step() -> None:
    """The noise level of a step is the border itself: one window acts there, not two and not none."""
    kind, identity = "sd15", person("sd15")
    model, calls = record(unet(kind))
    draw(model, kind, steps=4)
    sampling = unet(kind).get_model_object("model_sampling")
    border = 1 - float(sampling.timestep(torch.tensor(calls[2].sigma))) / 999
    assert sampling.percent_to_sigma(border) == pytest.approx(calls[2].sigma, rel=1e-6)
    first = apply(unet(kind), kind, identity, 1.0, 0.0, border)
    both, calls = record(apply(first, kind, identity, 1.0, border, 1.0))
    draw(both, kind, steps=4, cfg=1.0)
    for call in calls:
        assert_rows(kind, call, [(prompt(kind, "positive"), identity.adapter_tokens)])


def test_window_in_the_middle() -> None:
    kind = "sd15"
    sampling = unet(kind).get_model_object("model_sampling")
    start, end = 0.3, 0.7
    model, calls = record(apply(unet(kind), kind, person(kind), 1.0, start, end))
    draw(model, kind, steps=8)
    acted = [call.own is not None for call in calls]
    expected = [
        sampling.percent_to_sigma(end) < call.sigma <= sampling.percent_to_sigma(start) for call in calls
    ]
    assert acted == expected
    assert 0 < sum(acted) < 8


def test_negative_weight_is_the_opposite() -> None:
    kind, identity = "sd15", person("sd15")
    model, calls = record(apply(unet(kind), kind, identity, -0.5))
    draw(model, kind, steps=1, cfg=1.0)
    assert_rows(kind, calls[0], [(prompt(kind, "positive"), identity.adapter_tokens)], weight=-0.5)


def test_window_that_ends_before_it_starts_is_refused() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    with pytest.raises(InputError, match=r"start_percent \(0.6\) lies after end_percent \(0.2\)"):
        apply(unet("sd15"), "sd15", person("sd15"), 1.0, 0.6, 0.2)
