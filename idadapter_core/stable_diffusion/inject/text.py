"""Identities in the prompts of a base model: tokens among the text's states, or a word of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import InputError
from ...mechanisms.text import (
    ENCODERS,
    TextKind,
    identity_clause,
    normalize_text_tokens,
    with_identity_clause,
)
from ..text import Conditioning, TextEncoders


def with_identity(
    text: TextEncoders,
    prompt: str,
    kind: TextKind | None,
    tokens: Mapping[str, Tensor],
    class_word: str,
    strength: float,
) -> Callable[[float], Conditioning]:
    """A prompt with an identity in it: called with a scale, it gives the conditioning.

    Args:
        tokens: of the identity, per text encoder (1, n, width).
        class_word: the noun of the clause that brings the identity word into the prompt.
        strength: 0: not in the prompt; a word is in it at any other.

    Raises:
        InputError: a prompt without room for the tokens.
    """
    if kind == "word":
        if not strength or not tokens:
            encoded = text.encode([prompt])
        else:
            whole = (
                prompt
                if text.has_identifier(prompt)
                else with_identity_clause(prompt, class_word or "person")
            )
            encoded = text.encode([whole], tokens)
        return lambda scale: encoded
    plain = text.encode([prompt])
    if kind is None or not tokens:
        return lambda scale: plain
    count = next(t.shape[1] for t in tokens.values())
    if text.shortened(prompt, count) != prompt:
        raise InputError(
            f"the prompt is too long for {count} identity tokens beside it; shorten it: {prompt}"
        )
    words = normalize_text_tokens(tokens, text.reference_norms(count))

    def scaled(scale: float) -> Conditioning:
        factor = strength * scale
        return replace(plain, states=insert_tokens(plain.states, words * factor)) if strength else plain

    return scaled


def with_clause(text: TextEncoders, prompt: str, class_word: str, count: int) -> str:
    """A caption with the identity clause at its end, for a word of `count` embeddings; a caption that is too long for both loses
    its last words."""
    room = text.length(f", {identity_clause(class_word)}") + count - 1
    return with_identity_clause(text.shortened(prompt, room), class_word)


def insert_states(plain: Conditioning, tokens: Mapping[str, Tensor]) -> Conditioning:
    """Text states with an identity's tokens as they are, per encoder (B, n, width): how they are trained."""
    joined = torch.cat([tokens[name] for name in ENCODERS if name in tokens], dim=-1)
    return replace(plain, states=insert_tokens(plain.states, joined))


def insert_tokens(states: Tensor, tokens: Tensor) -> Tensor:
    """States (B, L, D) with identity tokens (1 or B, n, D) after BOS. The last n positions drop off, so the length stays."""
    tokens = tokens.to(states).expand(states.shape[0], -1, -1)
    return torch.cat([states[:, :1], tokens, states[:, 1 : states.shape[1] - tokens.shape[1]]], dim=1)
