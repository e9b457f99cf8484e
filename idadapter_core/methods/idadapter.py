"""IDAdapter: mixed facial features of N references, gated adapters, an identity word in the prompt (arXiv 2403.13535).

No weights were ever published, so names and layout are ours. The sizes are the paper's: with the `sd21` preset the mixer, the
gated adapters and the K/V weights hold 261.96 M parameters, as the paper's 262 M. The adapters have the shape of GLIGEN's gated
self-attention (arXiv 2301.07093), from which the paper takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import add_residual, gated_self_attention, merge_heads, split_heads
from ..errors import InputError, MismatchError
from ..mixing import concatenate_tokens, select_references, token_bias, weighted_mean
from ..resampler import PerceiverAttention, feed_forward
from ..sites import family_name
from ..types import FaceFeatures, Identity, Mix

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]

METHOD = "idadapter"
IDENTIFIER = "sks"  # the word of the prompt whose input embedding the identity replaces
UNCONDITIONAL = ("skip", "zeros")
ENCODERS = ("l", "g", "h")  # text encoders, by ComfyUI's names

_SD_WIDTHS = (320,) * 2 + (640,) * 2 + (1280,) * 2 + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
_SDXL_WIDTHS = (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10


def _heads_of_64(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(width // 64 for width in widths)


@dataclass(frozen=True)
class IDAdapterConfig:
    """Sizes of one IDAdapter. The defaults are the paper's: SD2.1, CLIP ViT-L/14, four references."""

    references: int = 4  # N, how many photos a person has in training
    vision_width: int = 1024  # of the CLIP vision model, of the mixer, and of E_r
    vision_patches: int = 256  # patch tokens of a photo
    embedding_width: int = 512
    mixer_depth: int = 2  # attention blocks of MFF; 0 leaves the features unmixed
    mixer_heads: int = 16
    tokens: int = 0  # what E_r keeps: 0 all (N * patches + 1), else a learned resampling to this many
    resampler_depth: int = 2  # of the resampling, where there is one
    text_encoders: tuple[str, ...] = (
        "h",
    )  # by ComfyUI's names: l and g (SD1.5, SDXL), h (SD2.1); empty: no identity word
    text_widths: tuple[int, ...] = (1024,)
    text_tokens: int = 1  # embeddings that the identity word becomes
    text_hidden: int = 1024
    context_width: int = 1024  # text width of the UNet
    site_widths: tuple[int, ...] = _SD_WIDTHS  # in checkpoint order
    site_heads: tuple[int, ...] = _heads_of_64(_SD_WIDTHS)
    unconditional: str = "skip"  # negative rows: adapters skipped, or tokens of zeroed features
    recognizer: str = ""  # digest of the face network it was trained with; empty: not recorded

    # What changes an identity, or what is done with it, and shows in no weight.
    unseen: ClassVar[tuple[str, ...]] = (
        "references",
        "mixer_heads",
        "site_heads",
        "text_encoders",
        "unconditional",
    )

    def __post_init__(self) -> None:
        sizes = (
            "references",
            "vision_width",
            "vision_patches",
            "embedding_width",
            "mixer_heads",
            "context_width",
        )
        counts = ("mixer_depth", "tokens", "resampler_depth")
        for least, names in ((1, sizes), (0, counts)):
            for name in names:
                if getattr(self, name) < least:
                    raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tokens and not self.resampler_depth:
            raise InputError(
                f"resampler_depth must be at least 1 where E_r is resampled (to {self.tokens} tokens), got 0: the tokens would "
                "not depend on the photos"
            )
        if len(self.text_encoders) != len(self.text_widths):
            raise InputError(
                f"text_encoders {self.text_encoders} and text_widths {self.text_widths} must be as many"
            )
        if len(set(self.text_encoders)) < len(self.text_encoders) or set(self.text_encoders) - set(ENCODERS):
            raise InputError(
                f"text_encoders must be different ones of {', '.join(ENCODERS)}, got {self.text_encoders}"
            )
        for name in ("text_tokens", "text_hidden"):
            if self.text_encoders and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_widths", "site_widths"):
            if any(width < 1 for width in getattr(self, name)):
                raise InputError(f"{name} must be at least 1 each, got {getattr(self, name)}")
        if not self.site_widths or len(self.site_widths) != len(self.site_heads):
            raise InputError(
                f"site_widths ({len(self.site_widths)}) and site_heads ({len(self.site_heads)}) must be as many, at least one"
            )
        for width, heads in (
            (self.vision_width, self.mixer_heads),
            *zip(self.site_widths, self.site_heads, strict=True),
        ):
            if heads < 1 or width % heads:
                raise InputError(f"width {width} must be divisible by its number of heads, got {heads}")
        if self.unconditional not in UNCONDITIONAL:
            raise InputError(
                f"unconditional must be one of {', '.join(UNCONDITIONAL)}, got {self.unconditional!r}"
            )

    @property
    def has_text_branch(self) -> bool:
        return bool(self.text_encoders)

    @property
    def has_adapter_branch(self) -> bool:
        return True


PRESETS = {
    "sd15": IDAdapterConfig(
        text_encoders=("l",), text_widths=(768,), context_width=768, site_heads=(8,) * len(_SD_WIDTHS)
    ),
    "sd21": IDAdapterConfig(),
    "sdxl": IDAdapterConfig(
        text_encoders=("l", "g"),
        text_widths=(768, 1280),
        context_width=2048,
        site_widths=_SDXL_WIDTHS,
        site_heads=_heads_of_64(_SDXL_WIDTHS),
    ),
}


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
    """Learned latents attend to the mixed tokens: E_r of a fixed length."""

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
        """E_r.

        Args:
            patch_tokens: (B, S, width), the references of one person side by side.
            face_feature: (B, 512), see `face_feature`.
            bias: (S,) added to the attention logits of the patch tokens.

        Returns:
            (B, S + 1, width), the face feature's token last; or (B, tokens, width) where the adapter resamples.
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
        """(B, vision width) -> per encoder (B, tokens, text width)."""
        return {
            name: rearrange(project(class_embedding), "b (n c) -> b n c", n=self.tokens)
            for name, project in self.encoders.items()
        }


class IDAdapterEncoder(nn.Module):
    """All that runs once per identity: MFF and the identity word."""

    def __init__(self, config: IDAdapterConfig):
        super().__init__()
        self.mixer = FeatureMixer(config)
        self.word = WordProjection(config)

    def forward(
        self, patch_tokens: Tensor, face_feature: Tensor, class_embedding: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """E_r (B, T, vision width) and the word's embeddings, per encoder (B, tokens, text width).

        Args:
            patch_tokens: (B, S, vision width) of all references of a person.
            face_feature: (B, 512), see `face_feature`.
            class_embedding: (B, vision width), mean over the references.
            bias: (S,), see `FeatureMixer`.
        """
        return self.mixer(patch_tokens, face_feature, bias), self.word(class_embedding)


def face_feature(embedding: Tensor, weights: Tensor) -> Tensor:
    """f_a (Eq. 4): the weighted mean (1, 512) of embeddings (F, 512), each brought to the length sqrt(512) first.

    Recognisers compare directions. The length of an embedding speaks of the photo's quality, so it must not weigh here.
    """
    unit = F.normalize(embedding.float(), dim=-1) * embedding.shape[-1] ** 0.5
    return weighted_mean(unit, weights)


@dataclass(frozen=True, eq=False)
class GateIdentity:
    """One identity at one gated adapter."""

    keys: Tensor  # (1 or B, T, C), from `GatedAdapter.project`
    values: Tensor  # (1 or B, T, C)
    bias: Tensor | None = None  # (T,)
    strength: float | Tensor = 1.0  # beta, times a mask: broadcasts against (B, N, 1)


class GatedAdapter(nn.Module):
    """One adapter between self-attention and cross-attention: Eq. 7, then a gated feed-forward.

    Both gates are tanh of a scalar that starts at 0, so a fresh adapter is exactly the identity. `operations` names where the
    layers come from: `torch.nn`, or a host's versions of them that manage memory and precision.
    """

    def __init__(self, token_width: int, width: int, heads: int, operations: Any = nn):
        super().__init__()
        self.heads = heads
        self.linear = operations.Linear(token_width, width)
        self.norm1 = operations.LayerNorm(width)
        self.to_qkv = operations.Linear(width, 3 * width, bias=False)
        self.to_out = operations.Linear(width, width)
        self.norm2 = operations.LayerNorm(width)
        self.ff_in = operations.Linear(width, 8 * width)
        self.ff_out = operations.Linear(4 * width, width)
        self.gate_attention = nn.Parameter(torch.zeros(()))
        self.gate_feed_forward = nn.Parameter(torch.zeros(()))

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, width) of E_r (B, T, token width). They do not depend on the image: once per run is enough."""
        projected = self.to_qkv(self.norm1(self.linear(tokens)))
        width = projected.shape[-1] // 3
        keys, values = (
            projected[..., width:].clone().chunk(2, dim=-1)
        )  # does not keep the queries' share alive
        return keys, values

    def forward(
        self,
        x: Tensor,
        identities: Sequence[GateIdentity],
        *,
        gates: tuple[float, float] | None = None,
        attention: Attention | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """y + beta * tanh(gamma) * S([y, E_r]), and the same with a feed-forward: (B, N, C) -> (B, N, C).

        Several identities add up: the attention of each with its own strength, the feed-forward with the sum of them. So
        one identity twice at half strength equals it once.

        Args:
            x: y, after the block's self-attention; overwritten if `inplace`.
            gates: tanh of the two gates where they are known on the host; a part whose gate is 0 is skipped. None reads the
                parameters.
            attention: see `attention.gated_self_attention`.
        """
        attend, feed = self._gates(gates)
        if _acts(attend):
            for mixed, strength in self._attend(x, identities, attention):
                x = add_residual(x, mixed, _factor(strength, attend, x), inplace)
                inplace = not x.requires_grad  # from here on it is ours
        if _acts(feed):
            x = add_residual(x, self._feed(x), _factor(_total(identities), feed, x), inplace)
        return x

    def residual(
        self,
        x: Tensor,
        identities: Sequence[GateIdentity],
        *,
        gates: tuple[float, float] | None = None,
        attention: Attention | None = None,
    ) -> Tensor:
        """What `forward` adds to x, (B, N, C). Subtracting x from its result would lose a small residual in the rounding of x."""
        attend, feed = self._gates(gates)
        added = torch.zeros_like(x)
        if _acts(attend):
            for mixed, strength in self._attend(x, identities, attention):
                added = add_residual(added, mixed, _factor(strength, attend, x))
        if _acts(feed):
            added = add_residual(added, self._feed(x + added), _factor(_total(identities), feed, x))
        return added

    def _gates(self, known: tuple[float, float] | None) -> tuple[float | Tensor, float | Tensor]:
        if known is not None:
            return known
        return self.gate_attention.float().tanh(), self.gate_feed_forward.float().tanh()

    def _attend(
        self, x: Tensor, identities: Sequence[GateIdentity], attention: Attention | None
    ) -> Iterator[tuple[Tensor, float | Tensor]]:
        """What each identity adds by attention, and its strength. All of them see x as it is now."""
        query, keys, values = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        for identity in identities:
            mixed = gated_self_attention(
                query,
                keys,
                values,
                identity.keys,
                identity.values,
                self.heads,
                bias=identity.bias,
                attention=attention,
            )
            yield self.to_out(mixed), identity.strength

    def _feed(self, x: Tensor) -> Tensor:
        value, gate = self.ff_in(self.norm2(x)).chunk(2, dim=-1)
        gate = F.gelu(gate)
        fed: Tensor = self.ff_out(gate * value if gate.requires_grad else gate.mul_(value))
        return fed


def _total(identities: Sequence[GateIdentity]) -> float | Tensor:
    return sum((identity.strength for identity in identities), start=0.0)


def _acts(gate: float | Tensor) -> bool:
    return isinstance(gate, Tensor) or gate != 0


def _factor(strength: float | Tensor, gate: float | Tensor, x: Tensor) -> float | Tensor:
    product = strength * gate
    return product.to(x.dtype) if isinstance(product, Tensor) else product


class _KeyValueDelta(nn.Module):
    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)


class IDAdapterGates(nn.ModuleDict):
    """The gated adapters by site number, with a name that hosts can show."""


class IDAdapterLayers(nn.Module):
    """What acts in the UNet, per cross-attention site, numbered as in checkpoints: the gated adapters, and what training added
    to the K and V weights of the cross-attention."""

    def __init__(self, config: IDAdapterConfig, operations: Any = nn):
        super().__init__()
        numbers = [str(2 * rank + 1) for rank in range(len(config.site_widths))]
        self.gates = IDAdapterGates(
            {
                number: GatedAdapter(config.vision_width, width, heads, operations)
                for number, width, heads in zip(numbers, config.site_widths, config.site_heads, strict=True)
            }
        )
        self.deltas = nn.ModuleDict(
            {
                number: _KeyValueDelta(config.context_width, width)
                for number, width in zip(numbers, config.site_widths, strict=True)
            }
        )

    def gate_values(self) -> dict[int, tuple[float, float]]:
        """tanh of the gates of each site, on the host."""
        values: dict[int, tuple[float, float]] = {}
        for number, gate in self.gates.items():
            assert isinstance(gate, GatedAdapter)
            attend, feed = (
                float(g.detach().float().tanh()) for g in (gate.gate_attention, gate.gate_feed_forward)
            )
            values[int(number)] = (attend, feed)
        return values

    def key_value_deltas(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Delta of the K and V weights (width, context width) of each site whose training changed them."""
        changed: dict[int, tuple[Tensor, Tensor]] = {}
        for number, delta in self.deltas.items():
            assert isinstance(delta, _KeyValueDelta)
            pair = (delta.to_k.weight, delta.to_v.weight)
            if any(bool(weight.any()) for weight in pair):
                changed[int(number)] = pair
        return changed


def initialise(
    encoder: IDAdapterEncoder, layers: IDAdapterLayers, config: IDAdapterConfig, seed: int = 0
) -> None:
    """The start of a training: small random weights, gates and K/V deltas at exactly 0.

    The identity word starts at the length of a usual word's embedding. Values are drawn in fp32 and rounded to the dtype of the
    parameters, one parameter after the other.
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
            # After GELU a unit normal has a root mean square of 0.65; CLIP's word embeddings have one of about 0.014.
            project[-1].weight.mul_(0.014 / 0.65)


def encode(encoder: IDAdapterEncoder, config: IDAdapterConfig, features: FaceFeatures, mix: Mix) -> Identity:
    """One identity from the photos of one person. Runs where the encoder's weights are, in fp32, without gradients.

    `learned` (which `auto` means): the references go through the mixer together, as in training. `concatenate` (ours): each
    photo goes through it alone and the results are put side by side. `mean` (ours): the features are averaged first.

    The adapter was trained with N references. From K > N photos N are chosen (`mixing.select_references`); K < N count N / K
    times each. One photo given N times, as the paper does at inference, has the same result: attention over repeated tokens
    equals attention over single ones with log N added to their logits. The same way photos are weighted.

    Raises:
        InputError: no faces, or a wrong number of weights.
        MismatchError: features without CLIP vision, or of other sizes.
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
        method=METHOD,
        recognizer=features.recognizer,
        class_word=chosen.class_word,
        adapter_bias=None if kept is None else kept[None],
    )


def _bias(weights: Tensor, config: IDAdapterConfig, tokens_each: int) -> Tensor | None:
    """Logits of the patch tokens: photo f counts N * w_f times. None where every photo counts once, as in training."""
    copies = config.references * weights
    return None if torch.allclose(copies, torch.ones_like(copies)) else token_bias(copies, tokens_each)


def _concatenated_bias(shares: Tensor, tokens_each: int, config: IDAdapterConfig) -> Tensor | None:
    """Logits of mixed tokens side by side: together the photos count like one identity made in training."""
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
    """What people call a CLIP vision model; its sizes where it has no name."""
    return _VISION_NAMES.get((width, patches), f"a CLIP vision model of width {width} with {patches} patches")


def require_vision(features: FaceFeatures, config: IDAdapterConfig) -> None:
    """Raise MismatchError unless the features hold what IDAdapter reads."""
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


def describe(config: IDAdapterConfig) -> list[str]:
    """What an adapter of these sizes is, in lines."""
    all_tokens = config.references * config.vision_patches + 1
    kept = f"resampled to {config.tokens}" if config.tokens else f"up to {all_tokens}, all kept"
    lines = [
        f"N = {config.references} references",
        f"for {family_name(len(config.site_widths), config.context_width)}; identity tokens: {kept}",
        f"CLIP vision of width {config.vision_width} with {config.vision_patches} patches",
    ]
    if config.has_text_branch:
        widths = ", ".join(
            f"{name} {width}" for name, width in zip(config.text_encoders, config.text_widths, strict=True)
        )
        embeddings = f"{config.text_tokens} embedding{'s' if config.text_tokens > 1 else ''}"
        lines.append(f"identity word ({embeddings}) for the text encoders {widths}")
    else:
        lines.append("no identity word")
    negative = (
        "without the adapters" if config.unconditional == "skip" else "with the tokens of zeroed features"
    )
    lines.append(f"negative prompts: {negative}")
    unknown = (
        "not recorded in the file; use the very face package it was trained with, others draw somebody else"
    )
    return [*lines, f"face recogniser: {config.recognizer or unknown}"]


def identity_clause(class_word: str) -> str:
    """What a prompt says of the person so that the identity word is in it."""
    return f"{class_word} is {IDENTIFIER}"


def with_identity_clause(text: str, class_word: str) -> str:
    """The prompt with the clause at its end, as in training."""
    stripped = text.rstrip(" \t\r\n,.;")
    return f"{stripped}, {identity_clause(class_word)}" if stripped else identity_clause(class_word)


def parameter_counts(config: IDAdapterConfig) -> dict[str, int]:
    """Trained parameters of each part: `mixer` (attention blocks), `face` (the projection of the face feature), `resampler`,
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


__all__ = [
    "IDENTIFIER",
    "METHOD",
    "PRESETS",
    "FeatureMixer",
    "GateIdentity",
    "GatedAdapter",
    "IDAdapterConfig",
    "IDAdapterEncoder",
    "IDAdapterLayers",
    "WordProjection",
    "describe",
    "encode",
    "face_feature",
    "identity_clause",
    "initialise",
    "parameter_counts",
    "require_vision",
    "with_identity_clause",
]
