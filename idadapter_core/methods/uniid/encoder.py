"""UniID's encoder: the two branches up to their tokens, which run once per identity."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import InputError, MismatchError
from ...mechanisms import Mechanisms
from ...mechanisms.decoupled import SiteProjections
from ...mixing import concatenate_tokens, select_references, token_bias, weighted_mean
from ...resampler import PerceiverAttention, feed_forward
from ...types import FaceFeatures, Identity, Mix
from ..common import draw_usual, resized_shallow
from .config import ENCODERS, FUSED_SIDE, UniIDConfig

NAME = "uniid"
STAGE_SIDES = (56, 28, 14, 7)


class _EmbeddingTokens(nn.Module):
    """The recogniser's output as tokens: (B, embedding) -> (B, tokens, width)."""

    def __init__(self, config: UniIDConfig, width: int):
        super().__init__()
        self.tokens = config.text_tokens
        self.proj = nn.Sequential(
            nn.Linear(config.embedding_width, config.text_hidden),
            nn.GELU(),
            nn.Linear(config.text_hidden, config.text_tokens * width),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        flat: Tensor = self.proj(embedding)
        return rearrange(flat, "b (n c) -> b n c", n=self.tokens)


class _TextResampler(nn.Module):
    """Resampler in which the text tokens attend to the deepest stage of the face network."""

    def __init__(self, config: UniIDConfig, width: int):
        super().__init__()
        self.proj_in = nn.Linear(config.stage_widths[3], width)
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, config.head_width), feed_forward(width)])
            for _ in range(config.text_depth)
        )

    def forward(self, tokens: Tensor, stage4: Tensor, bias: Tensor | None) -> Tensor:
        source = self.proj_in(stage4)
        for layer in self.layers:
            attend, feed = layer.children()
            tokens = attend(source, tokens, bias) + tokens
            tokens = feed(tokens) + tokens
        out: Tensor = self.norm_out(self.proj_out(tokens))
        return out


class TextBranch(nn.Module):
    """Encodes an identity as tokens in the output space of each text encoder."""

    def __init__(self, config: UniIDConfig):
        super().__init__()
        self.encoders = ENCODERS[: len(config.text_widths)]
        for number, width in enumerate(config.text_widths, start=1):
            self.add_module(f"proj_{number}", _EmbeddingTokens(config, width))
            self.add_module(f"norm_{number}", nn.LayerNorm(width))
            self.add_module(f"text_resampler_{number}", _TextResampler(config, width))

    def forward(self, embedding: Tensor, stage4: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        """embedding (B, 512), stage4 tokens (B, S, C4), bias (S,) -> {"l": (B, tokens, width), ...}."""
        out = {}
        for number, encoder in enumerate(self.encoders, start=1):
            tokens = getattr(self, f"norm_{number}")(getattr(self, f"proj_{number}")(embedding))
            out[encoder] = getattr(self, f"text_resampler_{number}")(tokens, stage4, bias)
        return out


class _AdapterResampler(nn.Module):
    """Resampler in which learned latents attend to the deepest stage, then to the fused shallow stages."""

    def __init__(self, config: UniIDConfig):
        super().__init__()
        width = config.adapter_width
        self.proj_face_recog_model_layers = nn.ModuleList(
            [nn.Linear(sum(config.stage_widths[:3]), width), nn.Linear(config.stage_widths[3], width)]
        )
        self.proj_out = nn.Linear(width, config.context_width)
        self.norm_out = nn.LayerNorm(config.context_width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, config.head_width),
                    PerceiverAttention(width, config.head_width),
                    feed_forward(width),
                ]
            )
            for _ in range(config.adapter_depth)
        )

    def forward(
        self, latents: Tensor, fused: Tensor, stage4: Tensor, fused_bias: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        project_fused, project_stage4 = self.proj_face_recog_model_layers
        fused, stage4 = project_fused(fused), project_stage4(stage4)
        for layer in self.layers:
            attend_stage4, attend_fused, feed = layer.children()
            latents = attend_stage4(stage4, latents, bias) + latents
            latents = attend_fused(fused, latents, fused_bias) + latents
            latents = feed(latents) + latents
        out: Tensor = self.norm_out(self.proj_out(latents))
        return out


class AdapterBranch(nn.Module):
    """Encodes an identity as tokens in the context space of the UNet's cross-attention."""

    def __init__(self, config: UniIDConfig):
        super().__init__()
        self.latents = nn.Parameter(
            torch.randn(1, config.adapter_tokens, config.adapter_width) / config.adapter_width**0.5
        )
        self.adapter_resampler = _AdapterResampler(config)

    def forward(
        self, fused: Tensor, stage4: Tensor, fused_bias: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """fused (B, S', C1 + C2 + C3), stage4 (B, S, C4), biases (S',) and (S,) -> (B, tokens, context width)."""
        latents = self.latents.expand(stage4.shape[0], -1, -1)
        tokens: Tensor = self.adapter_resampler(latents, fused, stage4, fused_bias, bias)
        return tokens


class UniIDEncoder(nn.Module):
    """Both branches up to their tokens, which run once per identity."""

    def __init__(self, config: UniIDConfig):
        super().__init__()
        self.text_branch = TextBranch(config) if config.has_text_branch else None
        self.adapter_branch = AdapterBranch(config) if config.has_adapter_branch else None

    def forward(
        self, embedding: Tensor, stages: tuple[Tensor, ...], weights: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Encode to text tokens and adapter tokens.

        Args:
            embedding: (B, 512), not normalised.
            stages: the four maps (B, C, side, side) of the face network, one person per row; or, with `weights`, the maps
                of F photos of one person while embedding is (1, 512).
            weights: (F,) summing to 1: the tokens of all photos form one sequence of keys, weighted in the softmax.
        """
        *shallow, deep = resized_shallow(stages, FUSED_SIDE)
        stage4 = rearrange(deep, "b c h w -> b (h w) c")
        fused = rearrange(torch.cat(shallow, dim=1), "b c h w -> b (h w) c")
        bias = fused_bias = None
        if weights is not None:
            bias, fused_bias = token_bias(weights, stage4.shape[1]), token_bias(weights, fused.shape[1])
            stage4, fused = concatenate_tokens(stage4), concatenate_tokens(fused)
        text = self.text_branch(embedding, stage4, bias) if self.text_branch is not None else {}
        adapter = (
            self.adapter_branch(fused, stage4, fused_bias, bias) if self.adapter_branch is not None else None
        )
        return text, adapter


def initialise(encoder: UniIDEncoder, layers: SiteProjections, config: UniIDConfig, seed: int = 0) -> None:
    """Initialise for training as published: PyTorch's default random weights, and adapter tokens of exactly 0.

    The K/V projections are random here as well; `recipe.start` copies them from the UNet's own, as published. Values are drawn in
    fp32, one parameter after the other, and rounded to the dtype of the parameters.

    With `proj_out` at 0 the norm after it outputs its bias, 0: K_id and V_id are 0, so a new adapter branch leaves the UNet's
    outputs exactly unchanged. That lasts for one step, in which only `proj_out` and the norm's bias have gradients; the layers
    before `proj_out` and the K/V projections have gradients from the second step on. The norm scales any output of `proj_out` to
    full size: with the published sizes and learning rate the tokens' root mean square is 0.6 after one step, 0.9 after three.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (encoder, layers):
            draw_usual(module, generator)
        branch = encoder.adapter_branch
        if branch is not None:
            drawn = torch.empty(branch.latents.shape)
            branch.latents.copy_(drawn.normal_(std=config.adapter_width**-0.5, generator=generator))
            for parameter in branch.adapter_resampler.proj_out.parameters():
                parameter.zero_()


def encode(encoder: UniIDEncoder, config: UniIDConfig, features: FaceFeatures, mix: Mix) -> Identity:
    """Encode the photos of one person to an identity. Runs on the encoder's device, in fp32, without gradients.

    `concatenate` (the default of `auto`; ours for more than one photo): mean of the embeddings, and the stage tokens of all
    photos as one sequence of keys. `mean`: the mean of embeddings and of stage maps. The caller sets the adapter's digest in
    the result (`adapter.Adapter.encode`).

    Raises:
        InputError: no faces, a wrong number of weights, or mode `learned`, which UniID does not support.
        MismatchError: features without the stage maps, or of the wrong size.
    """
    if mix.mode == "learned":
        raise InputError(
            "UniID has no learned mixing; set mode to auto, concatenate or mean (learned mixing is IDAdapter's)"
        )
    chosen, weights = select_references(features, mix)
    device = next(encoder.parameters()).device
    with torch.no_grad():
        weights = weights.to(device)
        embedding = weighted_mean(chosen.embedding.to(device, torch.float32), weights)
        stages = tuple(stage.to(device, torch.float32) for stage in chosen.stages)
        if mix.mode == "mean":
            stages = tuple(weighted_mean(stage, weights) for stage in stages)
        together = weights if len(chosen) > 1 and mix.mode != "mean" else None
        text, adapter = encoder(embedding, stages, together)
        zeros = tuple(torch.zeros_like(stage[:1]) for stage in stages)
        _, unconditional = encoder(torch.zeros_like(embedding), zeros)
    return Identity(
        adapter_tokens=adapter,
        adapter_tokens_uncond=unconditional,
        text_tokens=text,
        method=NAME,
        recognizer=features.recognizer,
        class_word=chosen.class_word,
    )


def require_stages(features: FaceFeatures, config: UniIDConfig) -> None:
    """Raise MismatchError unless the features hold all inputs of UniID."""
    if not features.stages:
        raise MismatchError(
            "UniID reads the inner layers of a face network of its own, and these faces were described by the face package's (no stage "
            "maps). In Load Face Analyzer set `recognizer` from 'from package' to UniID's network, the file of its iResNet-100 in "
            "models/idadapter/recognizers."
        )
    expected = [(width, side, side) for width, side in zip(config.stage_widths, STAGE_SIDES, strict=True)]
    found = [tuple(stage.shape[1:]) for stage in features.stages]
    if found != expected or features.embedding.shape[1] != config.embedding_width:
        raise MismatchError(
            f"these faces were described by another kind of face network than the one UniID reads (an embedding of "
            f"{features.embedding.shape[1]} and stage maps of {found}, not {config.embedding_width} and {expected}). In Load Face Analyzer "
            "set `recognizer` to the iResNet that the adapter was trained with."
        )


def layers(config: UniIDConfig) -> SiteProjections:
    """Build the K and V projections of the adapter tokens at each site; none without an adapter branch."""
    return SiteProjections(config.context_width, config.site_widths if config.has_adapter_branch else ())


def mechanisms(config: UniIDConfig, layers: SiteProjections) -> Mechanisms:
    """Return the mechanisms: decoupled attention."""
    return Mechanisms(decoupled=layers if config.has_adapter_branch else None)
