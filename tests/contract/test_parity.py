"""ComfyUI and diffusers make the same identities and the same pictures of the same files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.hosts import Act, Cast, Drawn
from tests.contract.samples import tokens

TOLERANCE = 2e-5
PICTURE_TOLERANCE = 1e-4
ACTS = 1e-3

Draw = Callable[[Cast], Drawn]


def compare(name: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, name
    difference = float((found - expected).abs().max())
    print(f"{name}: largest difference {difference:.2e}, of values up to {float(expected.abs().max()):.2f}")
    assert difference <= tolerance, name


@pytest.mark.parametrize("photos", [1, 2, 3])
def test_identities(photos: int, comfy_cast: Cast, diffusers_cast: Cast) -> None:
    """Tensor by tensor, and all that is said about them."""
    found, expected = (cast.person(1, photos) for cast in (comfy_cast, diffusers_cast))
    assert tokens(found).keys() == tokens(expected).keys()
    for name, tensor in tokens(expected).items():
        compare(name, tokens(found)[name], tensor)
    for name in ("method", "adapter", "recognizer", "class_word"):
        assert getattr(found, name) == getattr(expected, name), name
    assert expected.class_word == "woman"
    assert comfy_cast.host.digest(comfy_cast.adapter) == diffusers_cast.host.digest(diffusers_cast.adapter)


def one_person(cast: Cast) -> Drawn:
    return cast.host.draw(cast.act())  # type: ignore[no-any-return]


def half_of_two_photos(cast: Cast) -> Drawn:
    return cast.host.draw(Act(cast.adapter, cast.person(2, 2), 0.5))  # type: ignore[no-any-return]


def in_the_prompt(cast: Cast) -> Drawn:
    return cast.host.draw(cast.act(strength=0.8), said=cast.person())  # type: ignore[no-any-return]


def in_the_prompt_alone(cast: Cast) -> Drawn:
    return cast.host.draw(cast.act(strength=0.0), said=cast.person())  # type: ignore[no-any-return]


@pytest.mark.parametrize("draw", [one_person, half_of_two_photos, in_the_prompt, in_the_prompt_alone])
def test_pictures(draw: Draw, comfy_cast: Cast, diffusers_cast: Cast) -> None:
    """The text, what the UNet predicts at each step for negative and positive rows, and the picture."""
    found, expected = draw(comfy_cast), draw(diffusers_cast)
    for name, one, other in zip(("negative", "positive"), found.contexts, expected.contexts, strict=True):
        compare(f"{name} text", one, other)
    compare("negative rows", found.negative, expected.negative)
    compare("positive rows", found.positive, expected.positive)
    compare("picture", found.pictures(), expected.pictures(), PICTURE_TOLERANCE)


def test_the_base_models_agree(comfy_cast: Cast, diffusers_cast: Cast) -> None:
    found, expected = comfy_cast.host.draw(), diffusers_cast.host.draw()
    compare("rows", found.out, expected.out)
    compare("picture", found.pictures(), expected.pictures(), PICTURE_TOLERANCE)


def test_an_identity_of_one_host_works_in_the_other(
    comfy_cast: Cast, diffusers_cast: Cast, tmp_path: Any
) -> None:
    for here, there in ((comfy_cast, diffusers_cast), (diffusers_cast, comfy_cast)):
        file = here.host.save_identity(
            here.person(1), tmp_path / f"by {type(here.host).__name__}.safetensors"
        )
        person = there.host.load_identity(file, there.adapter)
        drawn = there.host.draw(Act(there.adapter, person), steps=1)
        assert drawn.distance(there.drawn(1)) <= TOLERANCE


# --- the injection itself, row by row --------------------------------------------------------------------------------


def test_each_row_of_a_call_has_its_own_person(diffusers_cast: Cast) -> None:
    host, adapter = diffusers_cast.host, diffusers_cast.adapter
    people = [diffusers_cast.person(seed) for seed in (1, 2)]
    together = host.predict(adapter, people)
    for row, person in enumerate(people):
        torch.testing.assert_close(host.predict(adapter, [person])[row], together[row], atol=1e-5, rtol=0)
    exchanged = host.predict(adapter, people[::-1])
    assert ((together - exchanged).abs().amax(dim=(1, 2, 3)) > ACTS).all()


def test_an_injection_that_is_ejected_leaves_nothing(diffusers_cast: Cast) -> None:
    """Also after an error, and no second one is let in beside the first."""
    host, adapter = diffusers_cast.host, diffusers_cast.adapter
    base, weights, traces = host.predict_alone(), host.weights(), host.traces()

    def fail_while_injected() -> None:
        with host.injected(adapter) as injected:
            injected.set_identity(diffusers_cast.person().adapter_tokens)
            assert (host.predict_alone() - base).abs().max() > ACTS
            with pytest.raises(host.refusal, match="injected into this .* already"):
                host.predict(adapter, [diffusers_cast.person(2)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_injected()
    assert host.traces() == traces
    assert torch.equal(host.predict_alone(), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in host.weights().items())
