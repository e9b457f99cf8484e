"""IDAdapter's encoder (mixed facial features and identity word), which runs once per identity, and its layers in the UNet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...attention import merge_heads, split_heads
from ...errors import MismatchError
from ...mechanisms import Mechanisms
from ...mechanisms.deltas import Delta, FullDelta, Place
from ...mechanisms.gated import GatedLayers
from ...mixing import concatenate_tokens, select_references, token_bias, weighted_mean
from ...resampler import PerceiverAttention, feed_forward
from ...types import FaceFeatures, Identity, Mix
from .config import IDAdapterConfig

NAME = "idadapter"


class _MixerBlock(nn.Module):
    """Self-attention and a feed-forward, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        query, keys, values = (
            split_heads(part, self.heads) for part in self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mask = None if bias is None else bias[None, None, None]
        x = x + self.to_out(merge_heads(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class _Resampler(nn.Module):
    """Resampler in which learned latents attend to the mixed tokens, for an E_r of fixed length."""

    def __init__(self, config: IDAdapterConfig):
        super().__init__()
        width = config.vision_width
        self.latents = nn.Parameter(torch.randn(1, config.tokens, width) / width**0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, width // config.mixer_heads), feed_forward(width)])
            for _ in range(config.resampler_depth)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, source: Tensor, bias: Tensor | None) -> Tensor:
        latents = self.latents.expand(source.shape[0], -1, -1)
        for layer in self.layers:
            attend, feed = layer.children()
            latents = attend(source, latents, bias) + latents
            latents = feed(latents) + latents
        out: Tensor = self.norm_out(latents)
        return out


class FeatureMixer(nn.Module):
    """P_visual (MFF, Eq. 5): patch tokens of all references and the projected face feature, mixed by attention."""

    def __init__(self, config: IDAdapterConfig):
        super().__init__()
        self.embedding_projection = nn.Linear(config.embedding_width, config.vision_width)
        self.blocks = nn.ModuleList(
            _MixerBlock(config.vision_width, config.mixer_heads) for _ in range(config.mixer_depth)
        )
        self.resampler = _Resampler(config) if config.tokens else None

    def forward(self, patch_tokens: Tensor, face_feature: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute E_r.

        Args:
            patch_tokens: (B, S, width), the references of one person concatenated.
            face_feature: (B, 512), see `face_feature`.
            bias: (S,) added to the attention logits of the patch tokens.

        Returns:
            (B, S + 1, width) with the face feature's token last, or (B, tokens, width) with a resampler.
        """
        x = torch.cat([patch_tokens, self.embedding_projection(face_feature)[:, None]], dim=1)
        bias = None if bias is None else F.pad(bias, (0, 1))
        for block in self.blocks:
            x = block(x, bias)
        return x if self.resampler is None else self.resampler(x, bias)


class WordProjection(nn.Module):
    """P_textual (Eq. 6): the mean class embedding as input embeddings of the identity word, one MLP per text encoder."""

    def __init__(self, config: IDAdapterConfig):
        super().__init__()
        self.tokens = config.text_tokens
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(config.vision_width),
                    nn.Linear(config.vision_width, config.text_hidden),
                    nn.GELU(),
                    nn.Linear(config.text_hidden, config.text_tokens * width),
                )
                for name, width in zip(config.text_encoders, config.text_widths, strict=True)
            }
        )

    def forward(self, class_embedding: Tensor) -> dict[str, Tensor]:
        """Map (B, vision width) to embeddings per encoder (B, tokens, text width)."""
        return {
            name: rearrange(project(class_embedding), "b (n c) -> b n c", n=self.tokens)
            for name, project in self.encoders.items()
        }


class IDAdapterEncoder(nn.Module):
    """The modules that run once per identity: MFF and the identity word."""

    def __init__(self, config: IDAdapterConfig):
        super().__init__()
        self.mixer = FeatureMixer(config)
        self.word = WordProjection(config)

    def forward(
        self, patch_tokens: Tensor, face_feature: Tensor, class_embedding: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute E_r (B, T, vision width) and the word's embeddings, per encoder (B, tokens, text width).

        Args:
            patch_tokens: (B, S, vision width), all references of a person.
            face_feature: (B, 512), see `face_feature`.
            class_embedding: (B, vision width), mean over the references.
            bias: (S,), see `FeatureMixer`.
        """
        return self.mixer(patch_tokens, face_feature, bias), self.word(class_embedding)


def face_feature(embedding: Tensor, weights: Tensor) -> Tensor:
    """f_a (Eq. 4): the weighted mean (1, 512) of embeddings (F, 512), each scaled to the norm sqrt(512) first.

    Recognisers compare directions. The norm of an embedding reflects the quality of the photo, so it must not act as a weight.
    """
    unit = F.normalize(embedding.float(), dim=-1) * embedding.shape[-1] ** 0.5
    return weighted_mean(unit, weights)


class _KeyValueDelta(nn.Module):
    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)


class IDAdapterLayers(nn.Module):
    """The UNet layers per cross-attention site, numbered as in checkpoints: the gated adapters, and the trained deltas of the K
    and V weights of the cross-attention."""

    def __init__(self, config: IDAdapterConfig, operations: Any = nn):
        super().__init__()
        self.gates = GatedLayers(config.vision_width, config.site_widths, config.site_heads, operations)
        self.deltas = nn.ModuleDict(
            {
                number: _KeyValueDelta(config.context_width, width)
                for number, width in zip(self.gates, config.site_widths, strict=True)
            }
        )

    def key_value_deltas(self) -> dict[Place, Delta]:
        """Return the deltas of the K and V weights (width, context width); all start at 0."""
        found: dict[Place, Delta] = {}
        for number, delta in self.deltas.items():
            assert isinstance(delta, _KeyValueDelta)
            for name, linear in (("to_k", delta.to_k), ("to_v", delta.to_v)):
                found[Place(int(number), f"attn2.{name}")] = FullDelta(linear)
        return found


def mechanisms(config: IDAdapterConfig, layers: IDAdapterLayers) -> Mechanisms:
    """Return the mechanisms: gated layers, and K and V deltas."""
    return Mechanisms(gated=layers.gates, deltas=layers.key_value_deltas())


def initialise(
    encoder: IDAdapterEncoder, layers: IDAdapterLayers, config: IDAdapterConfig, seed: int = 0
) -> None:
    """Initialise for training: small random weights, gates and K/V deltas at exactly 0.

    The identity word starts with the norm of an ordinary word embedding. Values are drawn in fp32, one parameter after the other,
    and rounded to the dtype of the parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (encoder, layers):
            for name, parameter in module.named_parameters():
                if "gate_" in name or name.startswith("deltas."):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                else:
                    drawn = torch.empty(parameter.shape)
                    parameter.copy_(drawn.normal_(std=parameter.shape[-1] ** -0.5, generator=generator))
        for project in encoder.word.encoders.values():
            assert isinstance(project, nn.Sequential)
            assert isinstance(project[-1], nn.Linear)
            # The root mean square of a unit normal after GELU is 0.65, that of CLIP's word embeddings about 0.014.
            project[-1].weight.mul_(0.014 / 0.65)


def encode(encoder: IDAdapterEncoder, config: IDAdapterConfig, features: FaceFeatures, mix: Mix) -> Identity:
    """Encode the photos of one person to an identity. Runs on the encoder's device, in fp32, without gradients.

    `learned` (the default of `auto`): the references go through the mixer together, as in training. `concatenate` (ours): each
    photo goes through the mixer alone, and the results are concatenated. `mean` (ours): the features are averaged first.

    The adapter was trained with N references. Of K > N photos, N are chosen (`mixing.select_references`); if K < N, each counts
    N / K times. The result equals one photo given N times, as in the paper's inference: attention over repeated tokens equals
    attention over single tokens with log N added to their logits. Photo weights work in the same way.

    Raises:
        InputError: no faces, or a wrong number of weights.
        MismatchError: features without CLIP vision, or of the wrong size.
    """
    mode = "learned" if mix.mode == "auto" else mix.mode
    limit = mix.references or config.references
    chosen, weights = select_references(features, replace(mix, references=limit))
    device = next(encoder.parameters()).device
    assert chosen.patch_tokens is not None  # require_vision
    assert chosen.class_embedding is not None
    with torch.no_grad():
        weights = weights.to(device)
        patches = chosen.patch_tokens.to(device, torch.float32)
        embedding = chosen.embedding.to(device, torch.float32)
        word_source = weighted_mean(chosen.class_embedding.to(device, torch.float32), weights)
        count = patches.shape[1]
        together = face_feature(embedding, weights)
        once = torch.ones(1, device=device)
        if mode == "learned":
            bias = _bias(weights, config, count)
            tokens, text = encoder(concatenate_tokens(patches), together, word_source, bias)
            kept = None if bias is None or config.tokens else F.pad(bias, (0, 1))
        else:
            alone = _bias(once, config, count)
            if mode == "mean":
                patches, features_each, shares = weighted_mean(patches, weights), together, once
            else:
                features_each = torch.cat([face_feature(one[None], once) for one in embedding])
                shares = weights
            mixed = encoder.mixer(patches, features_each, alone)
            text = encoder.word(word_source)
            tokens = concatenate_tokens(mixed)
            kept = _concatenated_bias(shares, mixed.shape[1], config)
        unconditional = None
        if config.unconditional == "zeros":
            zeros = torch.zeros(1, config.references * count, patches.shape[2], device=device)
            unconditional = encoder.mixer(zeros, torch.zeros_like(together))
    return Identity(
        adapter_tokens=tokens,
        adapter_tokens_uncond=unconditional,
        text_tokens=text,
        method=NAME,
        recognizer=features.recognizer,
        class_word=chosen.class_word,
        adapter_bias=None if kept is None else kept[None],
    )


def _bias(weights: Tensor, config: IDAdapterConfig, tokens_each: int) -> Tensor | None:
    """Logits of the patch tokens: photo f counts N * w_f times. None if every photo counts once, as in training."""
    copies = config.references * weights
    return None if torch.allclose(copies, torch.ones_like(copies)) else token_bias(copies, tokens_each)


def _concatenated_bias(shares: Tensor, tokens_each: int, config: IDAdapterConfig) -> Tensor | None:
    """Logits of concatenated mixed tokens: together the photos count like one identity in training."""
    if config.tokens:
        return None if len(shares) == 1 else token_bias(shares, tokens_each)
    parts = [
        torch.cat([token_bias(config.references * share[None], tokens_each - 1), share[None].log()])
        for share in shares
    ]
    bias = torch.cat(parts)
    return None if not bias.any() else bias


_VISION_NAMES = {
    (768, 49): "CLIP ViT-B/32",
    (768, 196): "CLIP ViT-B/16",
    (1024, 256): "CLIP ViT-L/14",
    (1024, 576): "CLIP ViT-L/14 at 336 px",
    (1280, 256): "CLIP ViT-H/14",
    (1664, 256): "CLIP ViT-bigG/14",
}


def vision_name(width: int, patches: int) -> str:
    """Return the common name of a CLIP vision model, or its sizes if it has none."""
    return _VISION_NAMES.get((width, patches), f"a CLIP vision model of width {width} with {patches} patches")


def require_vision(features: FaceFeatures, config: IDAdapterConfig) -> None:
    """Raise MismatchError unless the features hold all inputs of IDAdapter."""
    wanted = vision_name(config.vision_width, config.vision_patches)
    if features.patch_tokens is None or features.class_embedding is None:
        raise MismatchError(
            "these face features hold no CLIP vision features, which IDAdapter reads. Add Load CLIP Vision with the model the "
            f"adapter was trained with ({wanted}) and wire it to `clip_vision` of Extract Face Features."
        )
    patches, width = features.patch_tokens.shape[1:]
    if (width, patches) != (config.vision_width, config.vision_patches):
        raise MismatchError(
            f"the adapter was trained with {wanted}, wired to `clip_vision` of Extract Face Features is {vision_name(width, patches)}. "
            "Choose the one that the adapter was trained with in Load CLIP Vision."
        )
    if features.embedding.shape[1] != config.embedding_width:
        raise MismatchError(
            f"the adapter reads a face embedding of {config.embedding_width}, these features have "
            f"{features.embedding.shape[1]}. Choose the face network it was trained with in Load Face Analyzer."
        )


def parameter_counts(config: IDAdapterConfig) -> dict[str, int]:
    """Count the trained parameters of each part: `mixer` (attention blocks), `face` (projection of the face feature), `resampler`,
    `word`, `gates`, `deltas`."""
    with torch.device("meta"):
        encoder, layers = IDAdapterEncoder(config), IDAdapterLayers(config)

    def count(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    return {
        "mixer": count(encoder.mixer.blocks),
        "face": count(encoder.mixer.embedding_projection),
        "resampler": count(encoder.mixer.resampler),
        "word": count(encoder.word),
        "gates": count(layers.gates),
        "deltas": count(layers.deltas),
    }
