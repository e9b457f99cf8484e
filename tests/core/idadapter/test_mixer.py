"""The feature mixer and the resampling of IDAdapter against plain formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idadapter_core.methods.idadapter import FeatureMixer, IDAdapterConfig, IDAdapterEncoder
from tests.core.idadapter.small import KEPT, RESAMPLED, SMALL
from tests.golden import recipe
from tests.tiny.vision import WIDTH

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
