"""Identity in the prompt: tokens among the text encoder's output states, or a word whose input embedding is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

TextKind = Literal["states", "word"]
"""Kind of an identity's `text_tokens`: states in the text encoder's output, or input embeddings of the identity word."""

ENCODERS = (
    "l",
    "g",
    "h",
)  # text encoders by ComfyUI's names, in the order of their concatenated states
IDENTIFIER = "sks"  # the word of the prompt whose input embedding the identity replaces


@cache
def reference_names() -> tuple[str, ...]:
    """Return well-known names. The norms of their text states are the reference for identity tokens."""
    lines = Path(__file__).with_name("reference_names.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def normalize_text_tokens(text_tokens: Mapping[str, Tensor], reference_norms: Mapping[str, Tensor]) -> Tensor:
    """Scale identity text tokens to the norms of well-known names: (B, n, sum of widths), scale s_t = 1.

    Args:
        text_tokens: per encoder (B, n, width), as in `Identity.text_tokens`.
        reference_norms: per encoder (n,): L2 norm of the encoder's state at positions 1..n.
    """
    parts = []
    for encoder in ENCODERS:
        if encoder in text_tokens:
            tokens = text_tokens[encoder].float()
            norms = tokens.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            parts.append(
                tokens / norms * reference_norms[encoder].to(tokens.device).float().reshape(1, -1, 1)
            )
    return torch.cat(parts, dim=-1)


def identity_clause(class_word: str) -> str:
    """Return the clause that brings the identity word into a prompt: "woman is sks"."""
    return f"{class_word} is {IDENTIFIER}"


def with_identity_clause(text: str, class_word: str) -> str:
    """Append the identity clause to a prompt, as in training."""
    stripped = text.rstrip(" \t\r\n,.;")
    return f"{stripped}, {identity_clause(class_word)}" if stripped else identity_clause(class_word)
