"""Training recipe of IDAdapter (arXiv 2403.13535): N references, as a rule other photos than the target, the identity word in the caption, L_id."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError
from ...mechanisms.text import ENCODERS
from ...placeholders import CAPTION
from ..common import head_width
from ..method import AdapterContext, BatchFeatures, Encoded, Recipe
from .config import IDAdapterConfig
from .encoder import IDAdapterEncoder, face_feature


def sizes(context: AdapterContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that the base model fixes, and default sizes that suit it."""
    text_widths = context.text_widths
    if context.vision is None:
        raise ConfigError("an IDAdapter reads CLIP vision; name the model as base.vision")
    encoders = tuple(name for name in ENCODERS if name in text_widths)
    encoders = context.settings.get("text_encoders", encoders)  # a subset; empty: no identity word
    if missing := [name for name in encoders if name not in text_widths]:
        raise ConfigError(
            f"adapter.settings.text_encoders names {', '.join(missing)}, but the base has {', '.join(text_widths)}"
        )
    width, patches = context.vision
    facts = {
        "vision_width": width,
        "vision_patches": patches,
        "text_encoders": encoders,
        "text_widths": tuple(text_widths[name] for name in encoders),
        "site_heads": context.site_heads,
    }
    sizes = {
        "mixer_heads": width // head_width(width),
        "text_hidden": min(width, IDAdapterConfig.text_hidden),
    }
    return facts, sizes


def encode(encoder: IDAdapterEncoder, config: IDAdapterConfig, features: BatchFeatures) -> Encoded:
    """Encode E_r and the identity word. Where the identity is dropped, the gates are skipped or get the tokens of zeroed features,
    like negative prompts at inference."""
    assert features.patch_tokens is not None
    assert features.class_embedding is not None
    references = features.embedding[:, :-1]
    shares = torch.full((references.shape[1],), 1 / references.shape[1], device=references.device)
    feature = torch.cat([face_feature(one, shares) for one in references])
    patches = features.patch_tokens.flatten(1, 2)
    rows: torch.Tensor | None = features.identity
    if config.unconditional == "zeros":
        shown = features.identity.to(feature)
        feature, patches, rows = feature * shown[:, None], patches * shown[:, None, None], None
    tokens, word = encoder(patches, feature, features.class_embedding.mean(dim=1))
    return Encoded(tokens, rows, word)


RECIPE = Recipe(prompt=CAPTION, known_by_target=False, sizes=sizes, encode=encode, some_idle=True)
