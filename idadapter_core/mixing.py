"""How the faces of one person become one identity input, without training: weights per photo and token concatenation."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .errors import InputError
from .types import FaceFeatures, Mix


def select_references(features: FaceFeatures, mix: Mix) -> tuple[FaceFeatures, Tensor]:
    """The faces that take part and their weights.

    Faces of weight 0 are left out. With `mix.references` = N > 0, at most N faces remain: those of the largest weight, then
    of the highest detector score, in their original order.

    Returns:
        the chosen features, and weights (F,) fp32 that sum to 1.

    Raises:
        InputError: no face, or as many weights as there are not faces.
    """
    count = len(features)
    if count == 0:
        raise InputError("there is no face to make an identity from; wire at least one photo with a face")
    if mix.weights and len(mix.weights) != count:
        raise InputError(
            f"{len(mix.weights)} weights were given for {count} face{'s' if count > 1 else ''}; "
            "give one number per face, separated by commas, or leave the field empty"
        )
    weights = mix.weights or (1.0,) * count
    scores = [face.score for face in features.faces] or [0.0] * count
    ranked = sorted((i for i in range(count) if weights[i] > 0), key=lambda i: (-weights[i], -scores[i], i))
    chosen = sorted(ranked[: mix.references or count])
    largest = max(weights[i] for i in chosen)  # first to 1, so that no weight is out of fp32's range
    kept = torch.tensor(
        [weights[i] / largest for i in chosen], dtype=torch.float32, device=features.embedding.device
    )
    return features.pick(chosen), kept / kept.sum()


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean over faces: (F, ...) and weights (F,) that sum to 1 -> (1, ...)."""
    return torch.einsum("f,f...->...", weights.to(x.dtype), x)[None]


def concatenate_tokens(tokens: Tensor) -> Tensor:
    """Tokens of all faces in one sequence: (F, S, C) -> (1, F * S, C)."""
    return rearrange(tokens, "f s c -> 1 (f s) c")


def token_bias(weights: Tensor, tokens_per_face: int) -> Tensor:
    """Attention bias (F * S,) for concatenated tokens: the log of each face's weight.

    The softmax then shares its attention out by the weights, so that one photo given F times equals that photo given once.
    """
    return weights.log().repeat_interleave(tokens_per_face)
