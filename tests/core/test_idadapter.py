"""IDAdapter: the paper's sizes, the mixer against plain formulas, and what an identity takes from the photos."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.mechanisms.gated import GateIdentity
from idadapter_core.mechanisms.text import identity_clause, with_identity_clause
from idadapter_core.methods.idadapter import (
    PRESETS,
    FeatureMixer,
    IDAdapterConfig,
    IDAdapterEncoder,
    face_feature,
    parameter_counts,
)
from idadapter_core.methods.idadapter.config import describe
from idadapter_core.methods.uniid import UniIDConfig
from idadapter_core.types import FaceFeatures, Identity, Mix
from tests.golden import recipe
from tests.tiny.features import RECOGNIZER, face, face_features
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features
from tests.tiny.vision import PATCHES, WIDTH

SMALL = CONFIGS["sd15"]
N = SMALL.references
RESAMPLED = replace(SMALL, tokens=6)
MODES = ("learned", "concatenate", "mean")
KEPT = {"all": SMALL, "resampled": RESAMPLED}


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


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_the_sd21_preset_has_the_papers_size() -> None:
    counts = parameter_counts(PRESETS["sd21"])
    parts = {name: round(counts[name] / 1e6, 2) for name in ("deltas", "gates", "mixer")}
    assert parts == {"deltas": 25.56, "gates": 211.21, "mixer": 25.19}
    assert round(sum(counts[name] for name in parts) / 1e6, 2) == 261.96
    assert counts["resampler"] == 0


def test_every_preset_counts_as_its_shapes_say() -> None:
    for config in PRESETS.values():
        d, counts = config.vision_width, parameter_counts(config)
        gate = sum(d * w + w + 16 * w * w + 2 * 2 * w + w + 8 * w + w + 2 for w in config.site_widths)
        word = sum(2 * d + d * 1024 + 1024 + 1024 * w + w for w in config.text_widths)
        assert counts["gates"] == gate
        assert counts["deltas"] == 2 * config.context_width * sum(config.site_widths)
        assert counts["mixer"] == 2 * (12 * d * d + 13 * d)
        assert counts["face"] == 512 * d + d
        assert counts["word"] == word


def test_presets_are_of_their_families() -> None:
    sizes = {name: (len(c.site_widths), c.context_width, c.text_widths) for name, c in PRESETS.items()}
    assert sizes == {
        "sd15": (16, 768, (768,)),
        "sd21": (16, 1024, (1024,)),
        "sdxl": (70, 2048, (768, 1280)),
    }
    assert set(PRESETS["sd15"].site_heads) == {8}
    for name in ("sd21", "sdxl"):
        heads = zip(PRESETS[name].site_widths, PRESETS[name].site_heads, strict=True)
        assert {width / count for width, count in heads} == {64}
    assert PRESETS["sdxl"].site_widths == UniIDConfig().site_widths
    assert PRESETS["sd21"] == IDAdapterConfig()
    assert {(c.references, c.vision_width) for c in PRESETS.values()} == {(4, 1024)}


def test_a_resampling_has_a_size_of_its_own() -> None:
    kept, resampled = parameter_counts(SMALL), parameter_counts(RESAMPLED)
    assert resampled.pop("resampler") > kept.pop("resampler") == 0
    assert resampled == kept


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"references": 0}, "references must be at least 1, got 0"),
        ({"vision_width": 0}, "vision_width must be at least 1, got 0"),
        ({"vision_patches": 0}, "vision_patches must be at least 1, got 0"),
        ({"embedding_width": -1}, "embedding_width must be at least 1, got -1"),
        ({"mixer_heads": 0}, "mixer_heads must be at least 1, got 0"),
        ({"context_width": 0}, "context_width must be at least 1, got 0"),
        ({"mixer_depth": -1}, "mixer_depth must be at least 0, got -1"),
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"resampler_depth": -2}, "resampler_depth must be at least 0, got -2"),
        (
            {"tokens": 16, "resampler_depth": 0},
            "resampler_depth must be at least 1 where E_r is resampled (to 16",
        ),
        (
            {"text_encoders": ("l", "g")},
            "text_encoders ('l', 'g') and text_widths (1024,) must be as many",
        ),
        ({"text_encoders": ("t5",)}, "text_encoders must be different ones of l, g, h, got ('t5',)"),
        (
            {"text_encoders": ("l", "l"), "text_widths": (768, 768)},
            "must be different ones of l, g, h, got ('l', 'l')",
        ),
        ({"text_tokens": 0}, "text_tokens must be at least 1, got 0"),
        ({"text_hidden": 0}, "text_hidden must be at least 1, got 0"),
        ({"text_widths": (0,)}, "text_widths must be at least 1 each, got (0,)"),
        ({"site_widths": (0,), "site_heads": (1,)}, "site_widths must be at least 1 each, got (0,)"),
        ({"site_widths": (), "site_heads": ()}, "site_widths (0) and site_heads (0) must be as many"),
        ({"site_heads": (8,)}, "site_widths (16) and site_heads (1) must be as many, at least one"),
        ({"mixer_heads": 10}, "width 1024 must be divisible by its number of heads, got 10"),
        (
            {"site_widths": (320, 640), "site_heads": (5, 7)},
            "width 640 must be divisible by its number of heads, got 7",
        ),
        (
            {"site_widths": (320,), "site_heads": (0,)},
            "width 320 must be divisible by its number of heads, got 0",
        ),
        ({"unconditional": "none"}, "unconditional must be one of skip, zeros, got 'none'"),
    ],
)
def test_impossible_configs(changes: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        replace(IDAdapterConfig(), **changes)


def test_an_absent_identity_word_has_no_sizes_to_check() -> None:
    config = replace(SMALL, text_encoders=(), text_widths=(), text_tokens=0, text_hidden=0)
    assert not config.has_text_branch
    assert tiny_idadapter(config).encode(vision_features(1)).text_tokens == {}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "identity tokens: up to 65, all kept"),
        ({"tokens": 6}, "identity tokens: resampled to 6"),
        ({}, "CLIP vision of width 64 with 16 patches"),
        ({}, "identity word (1 embedding) for the text encoders l 64"),
        ({"text_tokens": 2}, "identity word (2 embeddings) for the text encoders l 64"),
        ({"text_encoders": (), "text_widths": ()}, "no identity word"),
        ({}, "negative prompts: without the adapters"),
        ({"unconditional": "zeros"}, "negative prompts: with the tokens of zeroed features"),
        ({}, "face recogniser: not recorded in the file"),
        ({"recognizer": "feed"}, "face recogniser: feed"),
    ],
)
def test_the_description_tells_the_settings(changes: dict[str, int], line: str) -> None:
    assert line in "\n".join(describe(replace(SMALL, **changes)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a person in Paris", "a photo of a person in Paris, woman is sks"),
        ("a photo, ", "a photo, woman is sks"),
        ("a photo ,", "a photo, woman is sks"),
        ("A photo.", "A photo, woman is sks"),
        ("", "woman is sks"),
        (" ,", "woman is sks"),
    ],
)
def test_the_clause_stands_at_the_end_of_the_prompt(text: str, expected: str) -> None:
    assert identity_clause("woman") == "woman is sks"
    assert with_identity_clause(text, "woman") == expected


# --- mixer -----------------------------------------------------------------------------------------------------------

BLOCK_NAMES = {
    "to_qkv.weight": "self_attn.in_proj_weight",
    "to_qkv.bias": "self_attn.in_proj_bias",
    "to_out.weight": "self_attn.out_proj.weight",
    "to_out.bias": "self_attn.out_proj.bias",
    "feed_forward.0.weight": "linear1.weight",
    "feed_forward.0.bias": "linear1.bias",
    "feed_forward.2.weight": "linear2.weight",
    "feed_forward.2.bias": "linear2.bias",
}


def mixer_of(config: IDAdapterConfig) -> FeatureMixer:
    mixer = FeatureMixer(config)
    recipe.fill(mixer, 3)
    return mixer.double().requires_grad_(False)


def torch_mixer(
    config: IDAdapterConfig, mixer: FeatureMixer, patches: Tensor, feature: Tensor, bias: Tensor | None
) -> Tensor:
    """The mixer's blocks by torch's own pre-norm transformer layer."""
    projection = mixer.embedding_projection
    x = torch.cat([patches, (feature @ projection.weight.T + projection.bias)[:, None]], dim=1)
    mask = None
    if bias is not None:
        mask = torch.cat([bias, bias.new_zeros(1)]).expand(x.shape[1], -1)
    for block in mixer.blocks:
        layer = nn.TransformerEncoderLayer(
            config.vision_width,
            config.mixer_heads,
            4 * config.vision_width,
            dropout=0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        )
        layer.load_state_dict({BLOCK_NAMES.get(key, key): t for key, t in block.state_dict().items()})
        x = layer(x, src_mask=mask)
    return x.detach()


def inputs(config: IDAdapterConfig, count: int) -> tuple[Tensor, Tensor]:
    """Two people's patch tokens and face features."""
    patches = recipe.value(3, "patches", (2, count, config.vision_width)).double()
    return patches, recipe.value(3, "feature", (2, config.embedding_width)).double()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_mixer_is_a_plain_transformer(depth: int, biased: bool) -> None:
    config = replace(SMALL, mixer_depth=depth)
    mixer = mixer_of(config)
    patches, feature = inputs(config, 10)
    bias = recipe.value(3, "bias", (10,)).double() if biased else None
    out = mixer(patches, feature, bias)
    assert out.shape == (2, 11, WIDTH)
    torch.testing.assert_close(out, torch_mixer(config, mixer, patches, feature, bias), atol=1e-10, rtol=0)


def test_the_paper_mixes_in_two_blocks_of_width_1024() -> None:
    config = IDAdapterConfig()
    assert (config.mixer_depth, config.vision_width, config.tokens) == (2, 1024, 0)


def test_a_mixer_without_blocks_leaves_the_features_as_they_are() -> None:
    config = replace(SMALL, mixer_depth=0)
    mixer = mixer_of(config)
    patches, feature = inputs(config, 10)
    out = mixer(patches, feature, torch.ones(10, dtype=torch.float64))
    assert torch.equal(out[:, :-1], patches)
    assert torch.equal(out[:, -1], mixer.embedding_projection(feature))


@pytest.mark.parametrize("biased", [True, False])
def test_resampling_is_attention_of_latents_to_the_mixed_tokens(biased: bool) -> None:
    mixer = mixer_of(RESAMPLED)
    patches, feature = inputs(RESAMPLED, 10)
    bias = recipe.value(3, "bias", (10,)).double() if biased else None
    mixed = torch_mixer(RESAMPLED, mixer, patches, feature, bias)
    weights = {
        key.removeprefix("resampler."): tensor
        for key, tensor in mixer.state_dict().items()
        if key.startswith("resampler.")
    }

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    latents = weights["latents"].expand(2, -1, -1)
    heads, head = RESAMPLED.mixer_heads, WIDTH // RESAMPLED.mixer_heads
    for number in range(RESAMPLED.resampler_depth):
        at, feed = f"layers.{number}.0", f"layers.{number}.1"
        queries = norm(latents, f"{at}.norm2")
        sources = torch.cat([norm(mixed, f"{at}.norm1"), queries], dim=1) @ weights[f"{at}.to_kv.weight"].T
        queries = queries @ weights[f"{at}.to_q.weight"].T
        logit_bias = torch.zeros(sources.shape[1], dtype=torch.float64)
        if bias is not None:
            logit_bias[: len(bias)] = bias
        parts = []
        for part in (slice(i * head, (i + 1) * head) for i in range(heads)):
            keys, values = sources[..., :WIDTH][..., part], sources[..., WIDTH:][..., part]
            logits = queries[..., part] @ keys.transpose(1, 2) / math.sqrt(head) + logit_bias
            parts.append(logits.softmax(-1) @ values)
        latents = latents + torch.cat(parts, dim=-1) @ weights[f"{at}.to_out.weight"].T
        hidden = F.gelu(norm(latents, f"{feed}.0") @ weights[f"{feed}.1.weight"].T)
        latents = latents + hidden @ weights[f"{feed}.3.weight"].T
    expected = norm(latents, "norm_out")
    out = mixer(patches, feature, bias)
    assert out.shape == (2, RESAMPLED.tokens, WIDTH)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("config", KEPT.values(), ids=KEPT)
def test_gradients_reach_every_weight_of_the_encoder(config: IDAdapterConfig) -> None:
    encoder = IDAdapterEncoder(config)
    recipe.fill(encoder, 3)
    patches, feature = (x.float() for x in inputs(config, 10))
    tokens, words = encoder(patches, feature, recipe.value(3, "class", (2, WIDTH)))
    (tokens.square().sum() + sum(word.square().sum() for word in words.values())).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


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
