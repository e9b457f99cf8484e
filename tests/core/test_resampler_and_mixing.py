"""The perceiver parts against a plain reference, and N faces as one identity."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError
from idadapter_core.mixing import concatenate_tokens, select_references, token_bias, weighted_mean
from idadapter_core.resampler import PerceiverAttention, feed_forward
from idadapter_core.types import FaceFeatures, Identity, Mix
from tests.golden import recipe
from tests.tiny.features import face, face_features
from tests.tiny.uniid import TINY_SD15, tiny_adapter

MODES = ("concatenate", "mean")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(TINY_SD15, tmp_path_factory.mktemp("adapter"))


def tokens(identity: Identity) -> dict[str, Tensor]:
    assert identity.adapter_tokens is not None
    return {**identity.text_tokens, "adapter": identity.adapter_tokens}


def assert_same(one: Identity, other: Identity, tolerance: float = 2e-5) -> None:
    for name, tensor in tokens(one).items():
        torch.testing.assert_close(tensor, tokens(other)[name], atol=tolerance, rtol=0)


def differs(one: Identity, other: Identity) -> bool:
    return all((tensor - tokens(other)[name]).abs().max() > 1e-3 for name, tensor in tokens(one).items())


# --- perceiver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 3])
def test_perceiver_attention_is_plain_attention(heads: int | None) -> None:
    width, head_width = 24, 8
    module = PerceiverAttention(width, head_width, heads)
    recipe.fill(module, 5)
    source, latents = recipe.value(5, "source", (2, 7, width)), recipe.value(5, "latents", (2, 4, width))
    weights = {name: tensor.double() for name, tensor in module.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    s, t = norm(source.double(), "norm1"), norm(latents.double(), "norm2")
    query = t @ weights["to_q.weight"].T
    inner = query.shape[-1]
    both = torch.cat([s, t], dim=1) @ weights["to_kv.weight"].T
    keys, values = both[..., :inner], both[..., inner:]
    parts = []
    for start in range(0, inner, head_width):
        part = slice(start, start + head_width)
        logits = query[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(head_width)
        parts.append(logits.softmax(-1) @ values[..., part])
    expected = torch.cat(parts, dim=-1) @ weights["to_out.weight"].T
    torch.testing.assert_close(module(source, latents).double(), expected, atol=1e-5, rtol=0)


def test_source_bias_is_the_log_of_how_often_a_token_stands_there() -> None:
    module = PerceiverAttention(16, 8)
    recipe.fill(module, 5)
    source, latents = recipe.value(5, "source", (1, 3, 16)), recipe.value(5, "latents", (1, 4, 16))
    repeated = module(source[:, [0, 0, 1, 2, 2, 2]], latents)
    weighted = module(source, latents, torch.tensor([2.0, 1.0, 3.0]).log())
    torch.testing.assert_close(weighted, repeated, atol=1e-5, rtol=0)
    left_out = module(source, latents, torch.tensor([1.0, 0.0, 1.0]).log())
    torch.testing.assert_close(left_out, module(source[:, [0, 2]], latents), atol=1e-5, rtol=0)


def test_feed_forward_has_the_published_key_names() -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in feed_forward(8).state_dict().items()}
    assert shapes == {"0.weight": (8,), "0.bias": (8,), "1.weight": (32, 8), "3.weight": (8, 32)}


# --- parts of mixing -------------------------------------------------------------------------------------------------


def chosen(features: FaceFeatures, mix: Mix) -> tuple[list[float], list[float]]:
    """The scores of the chosen faces, and their weights."""
    picked, weights = select_references(features, mix)
    return [each.score for each in picked.faces], weights.tolist()


def test_references_are_the_largest_weights_then_the_best_scores_in_their_order() -> None:
    features = face_features(1, 4, faces=[face(score) for score in (0.5, 0.9, 0.7, 0.8)])
    assert chosen(features, Mix()) == ([0.5, 0.9, 0.7, 0.8], [0.25] * 4)
    assert chosen(features, Mix(references=2)) == ([0.9, 0.8], [0.5, 0.5])
    assert chosen(features, Mix(references=9)) == chosen(features, Mix())
    assert chosen(features, Mix(references=2, weights=(3, 0, 1, 1))) == ([0.5, 0.8], [0.75, 0.25])
    assert chosen(features, Mix(references=3, weights=(0, 1, 0, 3))) == ([0.9, 0.8], [0.25, 0.75])


def test_references_without_scores_are_the_first() -> None:
    picked, _ = select_references(face_features(1, 3), Mix(references=2))
    assert torch.equal(picked.embedding, face_features(1, 3).embedding[:2])


@pytest.mark.parametrize("size", [1e-50, 1e-20, 1.0, 1e30, 1e308])
def test_only_the_ratio_of_weights_counts(size: float) -> None:
    _, weights = select_references(face_features(1, 3), Mix(weights=(size, size, 0)))
    assert weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("weights", "text"), [((1, 2, 3), "3 weights"), ((1,), "1 weights")])
def test_wrong_number_of_weights(weights: tuple[float, ...], text: str) -> None:
    with pytest.raises(InputError, match=f"{text} were given for 2 faces; give one number per face"):
        select_references(face_features(1, 2), Mix(weights=weights))


def test_no_face() -> None:
    with pytest.raises(InputError, match="there is no face to make an identity from"):
        select_references(face_features(1, 2).pick([]), Mix())


def test_small_parts() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(weighted_mean(x, torch.tensor([0.25, 0.75])), 0.25 * x[:1] + 0.75 * x[1:])
    assert torch.equal(concatenate_tokens(x), x.reshape(1, 6, 2))
    torch.testing.assert_close(
        token_bias(torch.tensor([0.25, 0.75]), 2).exp(), torch.tensor([0.25, 0.25, 0.75, 0.75])
    )


# --- one identity of many faces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 5])
def test_one_photo_many_times_equals_once(adapter: Adapter, mode: str, count: int) -> None:
    once = face_features(1)
    assert_same(adapter.encode(once.pick([0] * count), Mix(mode)), adapter.encode(once, Mix(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_order_of_the_photos_does_not_matter(adapter: Adapter, mode: str) -> None:
    features, weights = face_features(1, 3), (1.0, 2.0, 4.0)
    expected = adapter.encode(features, Mix(mode, weights=weights))
    for order in itertools.permutations(range(3)):
        shuffled = Mix(mode, weights=tuple(weights[i] for i in order))
        assert_same(adapter.encode(features.pick(list(order)), shuffled), expected)


@pytest.mark.parametrize("mode", MODES)
def test_weight_zero_leaves_a_photo_out(adapter: Adapter, mode: str) -> None:
    features = face_features(1, 3)
    without = adapter.encode(features, Mix(mode, weights=(1, 0, 2)))
    assert_same(without, adapter.encode(features.pick([0, 2]), Mix(mode, weights=(1, 2))), 0)
    assert differs(without, adapter.encode(features, Mix(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_counts_like_repetitions(adapter: Adapter, mode: str) -> None:
    features = face_features(1, 2)
    weighted = adapter.encode(features, Mix(mode, weights=(1, 3)))
    assert_same(weighted, adapter.encode(features.pick([0, 1, 1, 1]), Mix(mode)))
    assert differs(weighted, adapter.encode(features, Mix(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_a_vanishing_weight_approaches_none(adapter: Adapter, mode: str) -> None:
    features = face_features(1, 2)
    almost = adapter.encode(features, Mix(mode, weights=(1, 1e-8)))
    assert_same(almost, adapter.encode(features.pick([0]), Mix(mode)), 1e-4)


def test_mean_averages_the_features(adapter: Adapter) -> None:
    features = face_features(1, 2)
    averaged = FaceFeatures(
        embedding=features.embedding.mean(0, keepdim=True),
        stages=tuple(stage.mean(0, keepdim=True) for stage in features.stages),
    )
    assert_same(adapter.encode(features, Mix("mean")), adapter.encode(averaged))


def test_auto_concatenates(adapter: Adapter) -> None:
    features = face_features(1, 2)
    assert_same(adapter.encode(features), adapter.encode(features, Mix("concatenate")), 0)
    assert differs(adapter.encode(features), adapter.encode(features, Mix("mean")))


def test_references_limit_what_is_mixed(adapter: Adapter, tmp_path: Path) -> None:
    features = face_features(1, 3, faces=[face(score) for score in (0.5, 0.9, 0.7)])
    assert_same(adapter.encode(features, Mix(references=1)), adapter.encode(features.pick([1])), 0)
    assert_same(adapter.encode(features, Mix(references=2)), adapter.encode(features.pick([1, 2])), 0)
