"""Identities in the prompts of a base model: tokens among the text states, or a word of the prompt."""

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
    """Encode a prompt with an identity. Returns a function that maps a scale to the conditioning.

    Args:
        tokens: the identity's text tokens, per text encoder (1, n, width).
        class_word: the noun of the clause that brings the identity word into the prompt.
        strength: factor of tokens; 0 leaves the identity out. For a word any other value is the same.

    Raises:
        InputError: the prompt has no room for the tokens.
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
    """Append the identity clause to a caption, for a word of `count` embeddings. The last words of a too long caption are cut."""
    room = text.length(f", {identity_clause(class_word)}") + count - 1
    return with_identity_clause(text.shortened(prompt, room), class_word)


def insert_states(plain: Conditioning, tokens: Mapping[str, Tensor]) -> Conditioning:
    """Insert an identity's tokens, per encoder (B, n, width), into text states without scaling, as in training."""
    joined = torch.cat([tokens[name] for name in ENCODERS if name in tokens], dim=-1)
    return replace(plain, states=insert_tokens(plain.states, joined))


def insert_tokens(states: Tensor, tokens: Tensor) -> Tensor:
    """Insert identity tokens (1 or B, n, D) after BOS of states (B, L, D). The last n positions drop off, so L is kept."""
    tokens = tokens.to(states).expand(states.shape[0], -1, -1)
    return torch.cat([states[:, :1], tokens, states[:, 1 : states.shape[1] - tokens.shape[1]]], dim=1)
