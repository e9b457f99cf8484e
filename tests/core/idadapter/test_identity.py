"""An identity of IDAdapter: its tokens and its word, from one photo or several."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.mechanisms.gated import GateIdentity
from idadapter_core.methods.idadapter import face_feature
from idadapter_core.types import FaceFeatures, Identity, Mix
from tests.core.idadapter.small import KEPT, SMALL, N
from tests.golden import recipe
from tests.tiny.features import RECOGNIZER, face, face_features
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features
from tests.tiny.vision import PATCHES, WIDTH

MODES = ("learned", "concatenate", "mean")


@pytest.fixture(scope="module", params=KEPT)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Both choices of what E_r keeps."""
    return tiny_idadapter(KEPT[request.param])


@pytest.fixture(scope="module")
def plain() -> Adapter:
    """All tokens kept."""
    return tiny_idadapter(SMALL)


@pytest.fixture(scope="module")
def photos() -> FaceFeatures:
    return vision_features(1, N)


def tokens_of(identity: Identity) -> Tensor:
    assert identity.adapter_tokens is not None
    return identity.adapter_tokens


def effect(adapter: Adapter, identity: Identity) -> Tensor:
    """What the gated adapters of all sites add to some image tokens."""
    added = []
    bias = None if identity.adapter_bias is None else identity.adapter_bias[0]
    for (number, gate), width in zip(adapter.layers.gates.items(), adapter.config.site_widths, strict=True):
        y = recipe.value(7, f"y{number}", (2, 9, width))
        keys, values = gate.project(tokens_of(identity))
        added.append((gate(y, [GateIdentity(keys, values, bias)]) - y).flatten())
    return torch.cat(added)


def assert_same(adapter: Adapter, one: Identity, other: Identity) -> None:
    """Equal in what the gates compute and in the word, whatever the number of tokens."""
    torch.testing.assert_close(effect(adapter, one), effect(adapter, other), atol=2e-5, rtol=0)
    assert one.text_tokens.keys() == other.text_tokens.keys()
    for name, word in one.text_tokens.items():
        torch.testing.assert_close(word, other.text_tokens[name], atol=2e-5, rtol=0)


def differs(adapter: Adapter, one: Identity, other: Identity) -> bool:
    return bool((effect(adapter, one) - effect(adapter, other)).abs().max() > 1e-3)


# --- encode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_e_r_keeps(count: int) -> None:
    all_kept, resampled = (
        tiny_idadapter(config).encode(vision_features(1, count)) for config in KEPT.values()
    )
    assert tokens_of(all_kept).shape == (1, count * PATCHES + 1, WIDTH)
    assert tokens_of(resampled).shape == (1, 6, WIDTH)
    assert resampled.adapter_bias is None
    if count == N:
        assert all_kept.adapter_bias is None
    else:
        assert all_kept.adapter_bias is not None
        expected = torch.tensor([math.log(N / count)] * (count * PATCHES) + [0.0])
        torch.testing.assert_close(all_kept.adapter_bias, expected[None])


def test_n_photos_are_mixed_as_in_training(adapter: Adapter, photos: FaceFeatures) -> None:
    """Eq. 3 to 6, written out."""
    assert photos.patch_tokens is not None
    assert photos.class_embedding is not None
    identity = adapter.encode(photos)
    patches = torch.cat(list(photos.patch_tokens))[None]
    feature = face_feature(photos.embedding, torch.full((N,), 1 / N))
    with torch.no_grad():
        expected, word = adapter.encoder(patches, feature, photos.class_embedding.mean(0, keepdim=True))
    torch.testing.assert_close(tokens_of(identity), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(identity.text_tokens["l"], word["l"], atol=1e-5, rtol=0)
    assert identity.adapter_bias is None


def test_an_identity_knows_where_it_comes_from(plain: Adapter) -> None:
    features = vision_features(1, 3, faces=[face(sex=sex) for sex in ("M", "F", "F")])
    identity = plain.encode(features)
    assert (identity.method, identity.adapter, identity.recognizer) == ("idadapter", plain.digest, RECOGNIZER)
    assert identity.class_word == "woman"
    assert plain.encode(features, Mix(weights=(1, 0, 0))).class_word == "man"
    tensors = [tokens_of(identity), *identity.text_tokens.values()]
    assert {(tensor.dtype, tensor.requires_grad) for tensor in tensors} == {(torch.float32, False)}


def test_one_photo_n_times_equals_it_once(adapter: Adapter) -> None:
    one = vision_features(1)
    once = adapter.encode(one)
    for mode in MODES:
        assert_same(adapter, adapter.encode(one.pick([0] * N), Mix(mode)), once)


def test_one_photo_n_times_has_the_same_tokens(plain: Adapter) -> None:
    one = vision_features(1)
    once, repeated = plain.encode(one), plain.encode(one.pick([0] * N))
    patches, face_token = tokens_of(once)[:, :-1], tokens_of(once)[:, -1:]
    expected = torch.cat([patches.repeat(1, N, 1), face_token], dim=1)
    torch.testing.assert_close(tokens_of(repeated), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("references", "photos", "repeated"),
    [(4, 2, [0, 1, 0, 1]), (4, 2, [1, 1, 0, 0]), (6, 3, [0, 1, 2, 0, 1, 2]), (6, 2, [0, 0, 0, 1, 1, 1])],
)
@pytest.mark.parametrize("kept", KEPT)
def test_photos_that_divide_n_equal_their_repetition(
    kept: str, references: int, photos: int, repeated: list[int]
) -> None:
    adapter = tiny_idadapter(replace(KEPT[kept], references=references))
    features = vision_features(1, photos)
    assert_same(adapter, adapter.encode(features), adapter.encode(features.pick(repeated)))


@pytest.mark.parametrize("mode", MODES)
def test_order_of_the_photos_does_not_matter(adapter: Adapter, mode: str) -> None:
    features, weights = vision_features(1, 3), (1.0, 2.0, 4.0)
    expected = adapter.encode(features, Mix(mode, weights=weights))
    for order in itertools.permutations(range(3)):
        shuffled = Mix(mode, weights=tuple(weights[i] for i in order))
        assert_same(adapter, adapter.encode(features.pick(list(order)), shuffled), expected)


@pytest.mark.parametrize("mode", MODES)
def test_equal_weights_are_no_weights(adapter: Adapter, mode: str) -> None:
    features = vision_features(1, 2)
    plain, weighted = (adapter.encode(features, Mix(mode, weights=weights)) for weights in ((), (1.0, 1.0)))
    assert torch.equal(tokens_of(plain), tokens_of(weighted))
    assert torch.equal(effect(adapter, plain), effect(adapter, weighted))


@pytest.mark.parametrize("mode", MODES)
def test_weight_zero_leaves_a_photo_out(adapter: Adapter, mode: str) -> None:
    features = vision_features(1, 3)
    without = adapter.encode(features, Mix(mode, weights=(1, 0, 2)))
    assert_same(adapter, without, adapter.encode(features.pick([0, 2]), Mix(mode, weights=(1, 2))))
    assert differs(adapter, without, adapter.encode(features, Mix(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_counts_like_repetitions(adapter: Adapter, mode: str) -> None:
    features = vision_features(1, 2)
    weighted = adapter.encode(features, Mix(mode, weights=(3, 1)))
    assert_same(adapter, weighted, adapter.encode(features.pick([0, 0, 0, 1]), Mix(mode)))
    assert differs(adapter, weighted, adapter.encode(features, Mix(mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [1e-8, 1e-50])
def test_a_vanishing_weight_approaches_none(adapter: Adapter, mode: str, weight: float) -> None:
    features = vision_features(1, 2)
    almost = adapter.encode(features, Mix(mode, weights=(1, weight)))
    assert_same(adapter, almost, adapter.encode(features.pick([0])))


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_on_one_photo(adapter: Adapter, mode: str) -> None:
    one = vision_features(1)
    learned, other = adapter.encode(one), adapter.encode(one, Mix(mode))
    torch.testing.assert_close(tokens_of(other), tokens_of(learned), atol=1e-6, rtol=0)
    assert (other.adapter_bias is None) == (learned.adapter_bias is None)
    if learned.adapter_bias is not None:
        assert other.adapter_bias is not None
        torch.testing.assert_close(other.adapter_bias, learned.adapter_bias)
    assert_same(adapter, other, learned)


@pytest.mark.parametrize("mode", MODES)
def test_one_photo_of_one_reference_needs_no_bias(mode: str) -> None:
    single = tiny_idadapter(replace(SMALL, references=1))
    assert single.encode(vision_features(1), Mix(mode)).adapter_bias is None
    two = single.encode(vision_features(1, 2), Mix(mode, references=2))
    assert (two.adapter_bias is None) == (mode == "mean")


def test_modes_differ_on_two_photos(adapter: Adapter) -> None:
    features = vision_features(1, 2)
    identities = [adapter.encode(features, Mix(mode)) for mode in MODES]
    assert all(differs(adapter, *pair) for pair in itertools.combinations(identities, 2))


def test_auto_is_learned(adapter: Adapter) -> None:
    features = vision_features(1, 2)
    auto, learned = adapter.encode(features), adapter.encode(features, Mix("learned"))
    assert torch.equal(tokens_of(auto), tokens_of(learned))


def test_concatenated_photos_stand_side_by_side(plain: Adapter) -> None:
    features = vision_features(1, 2)
    identity = plain.encode(features, Mix("concatenate", weights=(3, 1)))
    alone = [tokens_of(plain.encode(features.pick([i]))) for i in range(2)]
    torch.testing.assert_close(tokens_of(identity), torch.cat(alone, dim=1), atol=1e-5, rtol=0)
    assert identity.adapter_bias is not None
    counts = identity.adapter_bias.exp().view(2, PATCHES + 1)
    torch.testing.assert_close(counts[:, :-1], torch.tensor([[3.0], [1.0]]).expand(2, PATCHES))
    torch.testing.assert_close(counts[:, -1], torch.tensor([0.75, 0.25]))


def test_mean_averages_patches_and_face_features(plain: Adapter) -> None:
    features, shares = vision_features(1, 2), torch.tensor([0.25, 0.75])
    assert features.patch_tokens is not None
    identity = plain.encode(features, Mix("mean", weights=(1, 3)))
    one, other = features.patch_tokens
    patches = (0.25 * one + 0.75 * other)[None]
    bias = torch.full((PATCHES,), math.log(N))
    with torch.no_grad():
        expected = plain.encoder.mixer(patches, face_feature(features.embedding, shares), bias)
    torch.testing.assert_close(tokens_of(identity), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_more_photos_than_references_are_chosen_from(adapter: Adapter, mode: str) -> None:
    features = vision_features(1, N + 2, faces=[face(score) for score in (0.9, 0.2, 0.8, 0.9, 0.1, 0.8)])
    features = replace(features, class_embedding=torch.ones(N + 2, WIDTH))
    best = adapter.encode(features.pick([0, 2, 3, 5]), Mix(mode))
    assert_same(adapter, adapter.encode(features, Mix(mode)), best)
    assert_same(
        adapter,
        adapter.encode(features, Mix(mode, references=1)),
        adapter.encode(features.pick([0]), Mix(mode)),
    )


def test_more_references_than_in_training_may_be_asked_for(plain: Adapter) -> None:
    identity = plain.encode(vision_features(1, 6), Mix(references=6))
    assert tokens_of(identity).shape == (1, 6 * PATCHES + 1, WIDTH)
    assert identity.adapter_bias is not None
    torch.testing.assert_close(identity.adapter_bias[0, 0].exp(), torch.tensor(N / 6))


@pytest.mark.parametrize("mode", MODES)
def test_length_of_an_embedding_does_not_matter(adapter: Adapter, mode: str) -> None:
    features = vision_features(1, 2)
    expected = adapter.encode(features, Mix(mode))
    lengths = torch.tensor([[0.01], [40.0]])
    assert_same(
        adapter,
        adapter.encode(replace(features, embedding=lengths * features.embedding), Mix(mode)),
        expected,
    )
    other = adapter.encode(replace(features, embedding=features.embedding.flip(1)), Mix(mode))
    assert differs(adapter, other, expected)


def test_the_face_feature_is_the_mean_of_directions() -> None:
    embedding = torch.zeros(2, 4)
    embedding[0, 0], embedding[1, 1] = 5.0, 0.1
    out = face_feature(embedding, torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(out, torch.tensor([[1.5, 0.5, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_accepted(adapter: Adapter, dtype: torch.dtype) -> None:
    features = vision_features(1, 2)
    assert features.patch_tokens is not None
    assert features.class_embedding is not None
    half = replace(
        features,
        embedding=features.embedding.to(dtype),
        patch_tokens=features.patch_tokens.to(dtype),
        class_embedding=features.class_embedding.to(dtype),
    )
    one, other = adapter.encode(features), adapter.encode(half)
    assert tokens_of(other).dtype == torch.float32
    torch.testing.assert_close(tokens_of(one), tokens_of(other), atol=0.1, rtol=0)


@pytest.mark.parametrize("kept", KEPT)
def test_unconditional_tokens_are_those_of_zeroed_features(kept: str) -> None:
    adapter = tiny_idadapter(replace(KEPT[kept], unconditional="zeros"))
    one = adapter.encode(vision_features(1)).adapter_tokens_uncond
    many = adapter.encode(vision_features(2, 3), Mix("mean")).adapter_tokens_uncond
    assert one is not None
    assert many is not None
    assert torch.equal(one, many)
    nothing = vision_features(1, N)
    assert nothing.patch_tokens is not None
    zeroed = adapter.encode(
        replace(nothing, embedding=0 * nothing.embedding, patch_tokens=0 * nothing.patch_tokens)
    )
    torch.testing.assert_close(one, tokens_of(zeroed), atol=1e-6, rtol=0)


def test_without_unconditional_tokens_the_adapters_are_skipped(plain: Adapter) -> None:
    assert plain.config.unconditional == "skip"
    assert plain.encode(vision_features(1)).adapter_tokens_uncond is None


# --- identity word ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text_tokens", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_word_is_an_mlp_of_the_weighted_mean_class_embedding(
    kind: str, text_tokens: int, mode: str
) -> None:
    config = replace(CONFIGS[kind], text_tokens=text_tokens)
    if kind == "sdxl":
        config = replace(config, text_widths=(64, 96))
    adapter, features = tiny_idadapter(config), vision_features(1, 2)
    assert features.class_embedding is not None
    identity = adapter.encode(features, Mix(mode, weights=(1, 3)))
    mean = (features.class_embedding[0] + 3 * features.class_embedding[1]).double() / 4
    weights = {key: tensor.double() for key, tensor in adapter.state_dict().items()}
    assert list(identity.text_tokens) == list(config.text_encoders)
    for name, width in zip(config.text_encoders, config.text_widths, strict=True):
        at = f"word.encoders.{name}"
        x = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        x = x * weights[f"{at}.0.weight"] + weights[f"{at}.0.bias"]
        x = F.gelu(weights[f"{at}.1.weight"] @ x + weights[f"{at}.1.bias"])
        expected = (weights[f"{at}.3.weight"] @ x + weights[f"{at}.3.bias"]).view(1, text_tokens, width)
        torch.testing.assert_close(identity.text_tokens[name].double(), expected, atol=1e-5, rtol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_features_without_clip_vision_say_which_node_to_add(plain: Adapter) -> None:
    for missing in ({"patch_tokens": None}, {"class_embedding": None}):
        features = replace(vision_features(1), **missing)
        with pytest.raises(
            MismatchError,
            match=r"no CLIP vision .*Add Load CLIP Vision .*\(a CLIP vision model of width 64 with 16 patches\).*`clip_vision` of Extract Face Features",
        ):
            plain.encode(features)
    with pytest.raises(MismatchError, match="no CLIP vision"):
        plain.encode(face_features(1))


@pytest.mark.parametrize(("width", "patches"), [(32, PATCHES), (WIDTH, 49), (1280, 256)])
def test_another_clip_vision_is_refused_with_both_sizes(plain: Adapter, width: int, patches: int) -> None:
    features = replace(
        vision_features(1), patch_tokens=torch.zeros(1, patches, width), class_embedding=torch.zeros(1, width)
    )
    found = (
        "CLIP ViT-H/14" if width == 1280 else f"a CLIP vision model of width {width} with {patches} patches"
    )
    text = f"of width 64 with 16 patches, wired to .* is {found}. Choose the one that"
    with pytest.raises(MismatchError, match=text):
        plain.encode(features)


def test_a_face_embedding_of_another_width_is_refused_with_both_sizes(plain: Adapter) -> None:
    features = replace(vision_features(1), embedding=torch.zeros(1, 256))
    with pytest.raises(
        MismatchError, match="reads a face embedding of 512, these features have 256. Choose the face network"
    ):
        plain.encode(features)


def test_another_recogniser_is_refused_with_both_names(plain: Adapter) -> None:
    trained = dataclasses.replace(plain, config=replace(plain.config, recognizer="feedfacefeedface"))
    with pytest.raises(
        MismatchError, match=rf"trained with another face recogniser .*\(feedfacefeedface, not {RECOGNIZER}\)"
    ):
        trained.encode(vision_features(1))
    assert trained.encode(vision_features(1, recognizer="feedfacefeedface")).adapter == plain.digest


def test_mixes_that_cannot_be() -> None:
    for weights in ((0.0, 0.0), (0.0,)):
        with pytest.raises(InputError, match="all weights are 0, so no face is left; give at least one"):
            Mix(weights=weights)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="weights must be finite numbers of at least 0"):
            Mix(weights=(1.0, bad))
    with pytest.raises(
        InputError, match="mode must be one of auto, learned, concatenate, mean, got 'average'"
    ):
        Mix("average")
    with pytest.raises(
        InputError, match=r"references must be 0 \(the adapter's own number\) or more, got -1"
    ):
        Mix(references=-1)


@pytest.mark.parametrize("mode", MODES)
def test_faces_and_weights_must_be_as_many(plain: Adapter, mode: str) -> None:
    features = vision_features(1, 2)
    with pytest.raises(
        InputError, match="there is no face to make an identity from; wire at least one photo"
    ):
        plain.encode(features.pick([]), Mix(mode))
    for weights in ((1.0,), (1.0, 2.0, 3.0)):
        with pytest.raises(InputError, match=f"{len(weights)} weights were given for 2 faces"):
            plain.encode(features, Mix(mode, weights=weights))
