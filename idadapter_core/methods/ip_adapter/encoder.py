"""IP-Adapter FaceID's tokens from the direction of a face embedding, and its layers in the UNet: K and V, and the LoRA of its file.

Equations as in tencent-ailab/IP-Adapter@62e4af9: X = LN(reshape(W2 gelu(W1 e / |e| + b1) + b2)); the zero vector means no face.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...errors import InputError, MismatchError
from ...mechanisms import Mechanisms
from ...mechanisms.decoupled import KeyValueProjection, SiteProjections
from ...mechanisms.deltas import Delta, LowRankDelta, Place
from ...mixing import concatenate_tokens, select_references, weighted_mean
from ...types import FaceFeatures, Identity, Mix
from ..common import draw_usual
from .config import FaceIDConfig

NAME = "ip_adapter"
CHANGED = ("to_q", "to_k", "to_v", "to_out")  # layers of both attentions that the LoRA changes
# The recogniser of antelopev2 (glintr100): its embeddings have the same width but are not compatible.
_OF_OTHER_PACKAGE = "4ab1d643"


class FaceIDEncoder(nn.Module):
    """Maps the direction of an embedding to tokens in the context space of the UNet."""

    def __init__(self, config: FaceIDConfig):
        super().__init__()
        self.image_proj = _Projection(config)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings (B, embedding width), of any norm, zeros for no face, to (B, tokens, context width)."""
        tokens: Tensor = self.image_proj(F.normalize(embedding.float(), dim=-1))
        return tokens


class _Projection(nn.Module):
    def __init__(self, config: FaceIDConfig):
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Sequential(
            nn.Linear(config.embedding_width, config.hidden_width),
            nn.GELU(),
            nn.Linear(config.hidden_width, config.tokens * config.context_width),
        )
        self.norm = nn.LayerNorm(config.context_width)

    def forward(self, direction: Tensor) -> Tensor:
        out: Tensor = self.norm(rearrange(self.proj(direction), "b (t d) -> b t d", t=self.tokens))
        return out


class _LowRank(nn.Module):
    def __init__(self, width_in: int, width_out: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)


def _add_low_rank(module: nn.Module, width: int, context: int, rank: int) -> None:
    for name in CHANGED if rank else ():
        width_in = context if name in ("to_k", "to_v") else width
        module.add_module(f"{name}_lora", _LowRank(width_in, width, rank))


class FaceIDLayers(nn.Module):
    """Layers by checkpoint number of each attention: K and V of the tokens (odd, cross-attention), and the LoRA of all attentions."""

    def __init__(self, config: FaceIDConfig):
        super().__init__()
        self.token_width = config.context_width
        self.sites = tuple(2 * rank + 1 for rank in range(len(config.site_widths)))
        for number, width in zip(self.sites, config.site_widths, strict=True):
            if config.lora_rank:
                own = nn.Module()
                _add_low_rank(own, width, width, config.lora_rank)
                self.add_module(str(number - 1), own)
            pair = KeyValueProjection(config.context_width, width)
            _add_low_rank(pair, width, config.context_width, config.lora_rank)
            self.add_module(str(number), pair)

    def pairs(self) -> dict[int, KeyValueProjection]:
        """Return the K and V projections by site."""
        found: dict[int, KeyValueProjection] = {}
        for number in self.sites:
            pair = self.get_submodule(str(number))
            assert isinstance(pair, KeyValueProjection)
            found[number] = pair
        return found

    def deltas(self) -> dict[Place, Delta]:
        """Return the LoRA deltas by layer."""
        found: dict[Place, Delta] = {}
        modules = dict(self.named_modules())
        for number in self.sites:
            for attention, owner in (("attn1", number - 1), ("attn2", number)):
                for name in CHANGED:
                    pair = modules.get(f"{owner}.{name}_lora")
                    if isinstance(pair, _LowRank):
                        layer = "to_out.0" if name == "to_out" else name
                        found[Place(number, f"{attention}.{layer}")] = LowRankDelta(pair.up, pair.down)
        return found


def mechanisms(config: FaceIDConfig, layers: FaceIDLayers) -> Mechanisms:
    """Return the mechanisms: decoupled attention, and the LoRA of the file."""
    return Mechanisms(
        decoupled=SiteProjections.around(layers.token_width, layers.pairs()), deltas=layers.deltas()
    )


@torch.no_grad()
def initialise(encoder: FaceIDEncoder, layers: FaceIDLayers, config: FaceIDConfig, seed: int = 0) -> None:
    """Initialise for training: default random weights, but V of the tokens and `up` of the LoRA at 0, so that a new adapter leaves
    the UNet's outputs exactly unchanged."""
    generator = torch.Generator().manual_seed(seed)
    draw_usual(encoder, generator)
    draw_usual(layers, generator)
    for name, parameter in layers.named_parameters():
        if "to_v_ip" in name or name.endswith("_lora.up.weight"):
            parameter.zero_()


def require_embedding(features: FaceFeatures, config: FaceIDConfig) -> None:
    """Raise MismatchError unless the features hold embeddings that fit the adapter."""
    if features.embedding.shape[1] != config.embedding_width:
        raise MismatchError(
            f"the adapter reads a face embedding of {config.embedding_width}, these features have "
            f"{features.embedding.shape[1]}. Choose the face network it was trained with in Load Face Analyzer."
        )
    if not config.recognizer and features.recognizer.startswith(_OF_OTHER_PACKAGE):
        raise MismatchError(
            "IP-Adapter FaceID reads buffalo_l's face recogniser, these faces were described by antelopev2's, whose numbers mean other "
            "people. Choose the package buffalo_l in Load Face Analyzer."
        )


@torch.no_grad()
def encode(encoder: FaceIDEncoder, config: FaceIDConfig, features: FaceFeatures, mix: Mix) -> Identity:
    """Encode the photos of one person to an identity. Runs on the encoder's device, in fp32, without gradients.

    `mean` (the default of `auto`): the mean of the embeddings' directions. `concatenate`: the tokens of all photos, with equal
    weights.

    Raises:
        InputError: no faces, a wrong number of weights, mode `learned`, or `concatenate` with unequal weights.
    """
    if mix.mode == "learned":
        raise InputError(
            "IP-Adapter FaceID has no learned mixing; set mode to auto, concatenate or mean (learned mixing is IDAdapter's)"
        )
    chosen, weights = select_references(features, mix)
    device = next(encoder.parameters()).device
    directions = F.normalize(chosen.embedding.to(device, torch.float32), dim=-1)
    if mix.mode == "concatenate":
        if not torch.allclose(weights, weights.mean().expand_as(weights)):
            raise InputError(
                "IP-Adapter FaceID's tokens of several photos count alike side by side; leave `weights` empty, or set mode to mean"
            )
        tokens = concatenate_tokens(encoder(directions))
        nobody = concatenate_tokens(encoder(torch.zeros_like(directions)))
    else:
        tokens = encoder(weighted_mean(directions, weights.to(device)))
        nobody = encoder(torch.zeros_like(directions[:1]))
    return Identity(
        adapter_tokens=tokens,
        adapter_tokens_uncond=nobody,
        method=NAME,
        recognizer=features.recognizer,
        class_word=chosen.class_word,
    )
