"""IDAdapter's changes to the K and V weights of the cross-attention: what ComfyUI patches in, and that it takes them out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes.idadapter_sampling import (
    KINDS,
    Made,
    apply,
    at_work,
    deltas,
    key_value_weights,
    person,
)
from tests.nodes.sampling import Conditioning, attach, difference, draw, left_half, prompt, sample, unet
from tests.tiny.checkpoints import tiny_unet


def plain(kind: str) -> dict[str, Tensor]:
    return at_work(unet(kind))


def assert_strength(model: Any, made: Made, strength: float, base: dict[str, Tensor] | None = None) -> None:
    """Check that the model works with W + strength * delta in every K and V of its cross-attention."""
    base = base or plain(made.kind)
    found, changes = at_work(model), deltas(made)
    assert found.keys() == base.keys() == changes.keys()
    for key, weight in found.items():
        assert changes[key].norm() > 0.1 * base[key].norm()
        torch.testing.assert_close(weight, base[key] + strength * changes[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.35, -0.5])
def test_weights_are_those_of_the_model_plus_the_difference(kind: str, weight: float) -> None:
    made = Made(kind)
    found, base, changes = at_work(apply(unet(kind), made, person(made), weight)), plain(kind), deltas(made)
    for key in found:
        assert torch.equal(found[key], base[key] + weight * changes[key])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_while_sampling_and_after(kind: str) -> None:
    """All weights of the model are what they were, bit for bit, as soon as it is sampled without the adapter."""
    from comfy.patcher_extension import WrappersMP

    made = Made(kind)
    seen: list[dict[str, Tensor]] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(key_value_weights(applied))
        return executor(*args, **kwargs)

    upstream = unet(kind)
    before = draw(upstream, kind)
    weights = {key: tensor.clone() for key, tensor in upstream.model.state_dict().items()}
    applied = apply(upstream, made, person(made), 0.6)
    applied.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", note)
    draw(applied, kind, steps=2)
    assert len(seen) == 2
    for found in seen:
        for key, change in deltas(made).items():
            assert torch.equal(found[key], weights[key] + 0.6 * change)
    assert torch.equal(draw(upstream, kind), before)
    after = upstream.model.state_dict()
    assert after.keys() == weights.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_only_changed_sites_are_patched(kind: str) -> None:
    made = Made(kind, closed=("deltas.3.to_k.weight", "deltas.3.to_v.weight", "deltas.7.to_v.weight"))
    model = apply(unet(kind), made, person(made))
    found, base = at_work(model), plain(kind)
    assert len(base.keys() - model.patches.keys()) == 3, "a weight that did not change needs no patch"
    changed = {key for key, change in deltas(made).items() if change.any()}
    assert len(changed) == len(base) - 3
    assert {key for key in found if not torch.equal(found[key], base[key])} == changed


@pytest.mark.parametrize("kind", KINDS)
def test_one_identity_several_times_counts_with_the_sum(kind: str) -> None:
    made = Made(kind)
    identity = person(made)
    half = apply(unet(kind), made, identity, 0.5)
    assert_strength(half, made, 0.5)
    assert_strength(apply(half, made, identity, 0.5), made, 1.0)
    assert_strength(apply(half, made, identity, -0.2), made, 0.3)


def test_identity_from_a_file_is_the_same_identity() -> None:
    """Load Identity makes a new object of it at each run of the graph."""
    made = Made("sd15")
    identity = person(made)
    copied = replace(identity, adapter_tokens=identity.adapter_tokens.clone())
    assert_strength(apply(apply(unet("sd15"), made, identity, 0.5), made, copied, 0.5), made, 1.0)


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [((1.0, 0.4), 1.0), ((0.4, 1.0), 1.0), ((1.0, 1.0), 1.0), ((-0.8, 0.3), -0.8), ((0.3, -0.8), -0.8)],
)
def test_several_people_want_them_once(strengths: tuple[float, float], expected: float) -> None:
    made, model = Made("sd15"), unet("sd15")
    for number, strength in enumerate(strengths):
        model = apply(model, made, person(made, number), strength)
    assert_strength(model, made, expected)


@pytest.mark.parametrize("other", ["place", "time"])
def test_one_identity_at_two_places_or_times_wants_them_once(other: str) -> None:
    made = Made("sd15")
    identity = person(made)
    left, right = left_half(), 1 - left_half()
    if other == "place":
        model = apply(unet("sd15"), made, identity, 0.8, mask=left)
        model = apply(model, made, identity, 0.6, mask=right)
    else:
        model = apply(unet("sd15"), made, identity, 0.8, end=0.5)
        model = apply(model, made, identity, 0.6, start=0.5)
    assert_strength(model, made, 0.8)
    place = {"mask": left.clone()} if other == "place" else {"end": 0.5}
    assert_strength(apply(model, made, identity, 0.1, **place), made, 0.9)


def test_three_people_of_whom_two_are_the_same() -> None:
    made, model = Made("sd15"), unet("sd15")
    for number, strength in ((1, 0.4), (2, 0.7), (1, 0.5)):
        model = apply(model, made, person(made, number), strength)
    assert_strength(model, made, 0.9)


def test_opposite_strengths_do_not_depend_on_the_order() -> None:
    made = Made("sd15")
    one, two = person(made, 1), person(made, 2)
    first = apply(apply(unet("sd15"), made, one, 0.5), made, two, -0.5)
    last = apply(apply(unet("sd15"), made, two, -0.5), made, one, 0.5)
    left, right = at_work(first), at_work(last)
    for key in left:
        torch.testing.assert_close(left[key], right[key])


@pytest.mark.parametrize("off", ["weight", "window", "mask"])
def test_who_is_switched_off_does_not_count(off: str) -> None:
    made = Made("sd15")
    arguments: dict[str, Any] = {
        "weight": {"weight": 0.0},
        "window": {"start": 0.5, "end": 0.5},
        "mask": {"mask": torch.zeros(1, 8, 8)},
    }[off]
    model = apply(apply(unet("sd15"), made, person(made, 1), **arguments), made, person(made, 2), 0.4)
    assert_strength(model, made, 0.4)


def test_masks_and_windows_do_not_weaken_them() -> None:
    """Weights are the same for every row, place and step."""
    made = Made("sd15")
    mask = torch.zeros(1, 8, 8)
    mask[..., :2] = 0.5
    assert_strength(apply(unet("sd15"), made, person(made), 0.8, 0.2, 0.4, mask), made, 0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_change_the_weights_side_by_side(kind: str) -> None:
    one, two = Made(kind), Made(kind, seed=3)
    first = apply(apply(unet(kind), one, person(one), 0.7), two, person(two), 0.5)
    last = apply(apply(unet(kind), two, person(two), 0.5), one, person(one), 0.7)
    base, changes, others = plain(kind), deltas(one), deltas(two)
    for found in (at_work(first), at_work(last)):
        for key, weight in found.items():
            torch.testing.assert_close(weight, base[key] + 0.7 * changes[key] + 0.5 * others[key])


def lora(kind: str) -> dict[str, Tensor]:
    """A LoRA file's contents for the K and V weights of the cross-attention."""
    contents: dict[str, Tensor] = {}
    for key, weight in plain(kind).items():
        name = key.removesuffix(".weight")
        width, context = weight.shape
        contents[f"{name}.lora_up.weight"] = recipe.weight(9, f"{key}.up", (width, 4))
        contents[f"{name}.lora_down.weight"] = recipe.weight(9, f"{key}.down", (4, context))
    return contents


def with_lora(model: Any, kind: str, strength: float = 0.8) -> Any:
    """What Load LoRA gives."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(kind), strength, 0)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_lora_on_the_same_weights(kind: str) -> None:
    """In any order."""
    made, contents = Made(kind), lora(kind)
    identity, base, changes = person(made), plain(kind), deltas(made)
    before = apply(with_lora(unet(kind), kind), made, identity, 0.7)
    after = with_lora(apply(unet(kind), made, identity, 0.7), kind)
    between = apply(with_lora(apply(unet(kind), made, identity, 0.5), kind), made, identity, 0.2)
    for model in (before, after, between):
        for key, weight in at_work(model).items():
            name = key.removesuffix(".weight")
            product = contents[f"{name}.lora_up.weight"] @ contents[f"{name}.lora_down.weight"]
            assert product.norm() > 0.1 * base[key].norm()
            torch.testing.assert_close(weight, base[key] + 0.7 * changes[key] + 0.8 * product)
    assert difference(draw(before, kind), draw(after, kind)) < 1e-4
    assert difference(draw(before, kind), draw(with_lora(unet(kind), kind), kind)) > 0.01


@dataclass
class Room:
    """How many bytes of a model ComfyUI finds room for; 0: for all of it."""

    bytes: int = 0


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    import comfy.model_management as memory

    original, room = memory.LoadedModel.model_load, Room()

    def model_load(self: Any, lowvram_model_memory: int = 0, **options: Any) -> Any:
        return original(self, room.bytes or lowvram_model_memory, **options)

    memory.unload_all_models()
    monkeypatch.setattr(memory.LoadedModel, "model_load", model_load)
    yield room
    memory.unload_all_models()


@pytest.mark.parametrize("kind", KINDS)
def test_low_memory(kind: str, room: Room) -> None:
    """Where nothing fits, layers are patched anew at each use instead of once, and the gates' are fetched at each use."""
    made = Made(kind)
    identity = person(made)

    def model() -> Any:
        # One of its own: the shared one's weights are no playground.
        return with_lora(apply(tiny_unet(kind), made, identity, 0.7), kind)

    roomy = draw(model(), kind)
    room.bytes = 1
    cramped = model()
    plain_weights = key_value_weights(cramped)
    result = draw(cramped, kind)
    assert cramped.lowvram_patch_counter() == len(deltas(made)), "it was no test of low memory"
    for key, weight in key_value_weights(cramped).items():
        assert torch.equal(weight, plain_weights[key])
    assert torch.equal(result, roomy)


def test_an_attached_stranger_leaves_them_alone() -> None:
    """They follow the nodes on the MODEL; an identity attached to a prompt takes the place of one of them."""
    made = Made("sd15")
    model = apply(unet("sd15"), made, person(made, 1), 0.6)
    positive: Conditioning = attach(prompt("sd15", "positive"), person(made, 2))
    sample(model, positive, prompt("sd15", "negative"), steps=1)
    assert_strength(model, made, 0.6)


def test_half_precision_weights() -> None:
    made = Made("sd15", dtype=torch.float16)
    base = tiny_unet("sd15", dtype=torch.bfloat16)
    plain = {key: tensor.float() for key, tensor in key_value_weights(base).items()}
    found = at_work(apply(base, made, person(made), 0.7))
    for key, change in deltas(made).items():
        assert found[key].dtype == torch.bfloat16
        assert difference(found[key].float(), plain[key] + 0.7 * change.float()) < 0.01
