"""Somebody between two people: exact at both ends, nearer to the nearer one between, refused across adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from idadapter_core.errors import InputError, MismatchError
from idadapter_core.identity import identical, load_identity, merged, save_identity
from idadapter_core.types import Identity
from tests.golden import recipe


def identity(seed: int, tokens: int = 5, method: str = "idadapter", **changes: object) -> Identity:
    made = Identity(
        recipe.value(seed, "tokens", (1, tokens, 8)) * (seed + 1),
        recipe.value(9, "nobody", (1, tokens, 8)),
        {"l": recipe.value(seed, "text", (1, 3, 4))},
        method=method,
        adapter="one",
        recognizer="net",
        class_word="woman",
        embedding=torch.nn.functional.normalize(recipe.value(seed, "embedding", (1, 16)), dim=1),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


A, B = identity(1), identity(2)


def test_the_ends_are_the_two_themselves() -> None:
    assert identical(merged(A, B, 0), A)
    assert identical(merged(A, B, 1), B)


def test_tokens_and_their_lengths_lie_between() -> None:
    near, far = merged(A, B, 0.25), merged(A, B, 0.75)
    one, other = A.adapter_tokens, B.adapter_tokens
    for found, share in ((near.adapter_tokens, 0.25), (far.adapter_tokens, 0.75)):
        assert found is not None
        assert one is not None
        assert other is not None
        expected = torch.lerp(one.norm(dim=-1), other.norm(dim=-1), share)
        torch.testing.assert_close(found.norm(dim=-1), expected)
    assert near.adapter_tokens is not None
    assert far.adapter_tokens is not None
    assert one is not None
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(near.adapter_tokens, one, dim=-1) > cosine(far.adapter_tokens, one, dim=-1)).all()
    assert near.embedding is not None
    assert near.embedding.norm() == pytest.approx(1)
    torch.testing.assert_close(near.adapter_tokens_uncond, A.adapter_tokens_uncond)
    assert near.text_tokens["l"].shape == A.text_tokens["l"].shape


def test_exchanging_the_two_exchanges_the_ratio() -> None:
    for first, second in ((A, B), (A, identity(2, tokens=3))):
        one, other = merged(first, second, 0.3), merged(second, first, 0.7)
        assert one.adapter_tokens is not None
        assert other.adapter_tokens is not None
        assert sorted(one.adapter_tokens.flatten().tolist()) == pytest.approx(
            sorted(other.adapter_tokens.flatten().tolist()), abs=1e-5
        )


def test_of_different_numbers_of_photos_all_tokens_stay_and_count_by_the_ratio() -> None:
    found = merged(A, identity(2, tokens=10), 0.25)
    assert found.adapter_tokens is not None
    assert found.adapter_bias is not None
    assert found.adapter_tokens.shape == (1, 15, 8)
    copies = found.adapter_bias.exp()
    torch.testing.assert_close(copies[:, :5], torch.full((1, 5), 0.75))
    torch.testing.assert_close(copies[:, 5:], torch.full((1, 10), 0.25))


def test_a_bias_that_both_have_stays() -> None:
    """As of one photo each: its tokens count as often as those of all photos in training."""
    copies = torch.full((1, 5), 4.0).log()
    one, other = (identity(seed, adapter_bias=copies) for seed in (1, 2))
    found = merged(one, other, 0.25)
    assert found.adapter_tokens is not None
    assert found.adapter_tokens.shape == (1, 5, 8)
    torch.testing.assert_close(found.adapter_bias, copies)


@pytest.mark.parametrize("tokens", [3, 5])
def test_together_they_count_as_often_as_one_identity(tokens: int) -> None:
    """So the strength does not jump where the ratio leaves 0 or reaches 1."""
    one = identity(1, adapter_bias=torch.full((1, 5), 2.0).log())
    other = identity(2, tokens, adapter_bias=torch.full((1, tokens), 10 / tokens * 1.5).log())
    for ratio in (1e-6, 0.5, 1 - 1e-6):
        bias = merged(one, other, ratio).adapter_bias
        assert bias is not None
        assert float(bias.exp().sum()) == pytest.approx(10 * (1 - ratio) + 15 * ratio, rel=1e-4)


def test_tokens_of_nobody_are_not_doubled() -> None:
    found = merged(A, replace(identity(2, tokens=10), adapter_tokens_uncond=A.adapter_tokens_uncond), 0.5)
    torch.testing.assert_close(found.adapter_tokens_uncond, A.adapter_tokens_uncond)


def test_class_words_that_differ_are_left_open() -> None:
    assert merged(A, B, 0.5).class_word == "woman"
    assert merged(A, identity(2, class_word="man"), 0.5).class_word == ""
    assert merged(A, identity(2, class_word="man"), 1).class_word == "man"


def test_parts_that_an_adapter_lacks_stay_away(tmp_path: object) -> None:
    changes = {"adapter_tokens": None, "adapter_tokens_uncond": None, "embedding": None}
    found = merged(identity(1, **changes), identity(2, **changes), 0.5)
    assert (found.adapter_tokens, found.adapter_tokens_uncond, found.embedding) == (None, None, None)
    assert found.adapter_bias is None
    assert set(found.text_tokens) == {"l"}


def test_a_merged_identity_is_saved_as_any_other(tmp_path: object) -> None:
    path = f"{tmp_path}/merged.safetensors"
    for second in (B, identity(2, tokens=10)):
        found = merged(A, second, 0.5)
        save_identity(found, path)
        assert identical(load_identity(path), found)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="between 0"):
        merged(A, B, ratio)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": "two"}, "different adapters .one and two."),
        ({"recognizer": ""}, "face recognisers .net and .unknown"),
    ],
)
def test_different_adapters_or_recognisers_are_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(MismatchError, match=said):
        merged(A, replace(B, **changes), 0.5)  # type: ignore[arg-type]


def test_a_method_that_cannot_weigh_tokens_takes_equal_numbers_only() -> None:
    one, other = (identity(seed, tokens, "ip_adapter") for seed, tokens in ((1, 4), (2, 16)))
    with pytest.raises(MismatchError, match="4 and 16.*mode mean"):
        merged(one, other, 0.5)
    assert merged(one, identity(2, 4, "ip_adapter"), 0.5).adapter_bias is None
