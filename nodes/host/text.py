"""Identities in prompts: tokens inserted into the text encoder's output, or a word embedding in its input."""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import torch
from torch import Tensor

from ...idadapter_core.errors import MismatchError
from ...idadapter_core.identity import text_kind
from ...idadapter_core.mechanisms.text import (
    ENCODERS,
    IDENTIFIER,
    normalize_text_tokens,
    reference_names,
    with_identity_clause,
)
from ...idadapter_core.sites import text_family_name
from ...idadapter_core.types import Identity
from .conditioning import PROMPTED, TEXT_POSITIONS, Prompted
from .plan import KEY
from .rows import RowTags
from .run import Run

Conditioning = list[list[Any]]

# Matches the identifier with the tokenizer's word boundaries: letters continue a word, digits and underscores do not, and 's is a
# word of its own. The first alternative skips the names of embedding files.
_IDENTIFIER = re.compile(
    rf"((?<![^\s()])embedding:[^\s()<\[]+)|(?<!')(?<![^\W\d_])(?i:{IDENTIFIER})(?![^\W\d_])"
)

_reference_norms: WeakKeyDictionary[Any, dict[Any, dict[str, Tensor]]] = WeakKeyDictionary()


def encoder_widths(clip: Any) -> dict[str, int]:
    """Return the width of each text encoder of a CLIP, in concatenation order; 0 for one that is not a CLIP text model."""
    names = clip.tokenize("").keys()
    ordered = [*(name for name in ENCODERS if name in names), *sorted(names - set(ENCODERS))]
    return {name: 0 if (e := _embeddings(clip, name)) is None else e.weight.shape[1] for name in ordered}


def _embeddings(clip: Any, encoder: str) -> Any:
    model = getattr(clip.cond_stage_model, f"clip_{encoder}", None)
    transformer: Any = getattr(model, "transformer", None)
    return transformer.get_input_embeddings() if hasattr(transformer, "get_input_embeddings") else None


def require_text_encoders(clip: Any, identity: Identity) -> None:
    """Raise MismatchError unless the identity's text tokens fit the encoders of this CLIP."""
    found = encoder_widths(clip)
    wanted = {name: tokens.shape[-1] for name, tokens in identity.text_tokens.items()}
    if found != wanted:
        here, there = text_family_name(found), text_family_name(wanted)
        raise MismatchError(
            f"the identity's adapter was made for {there}, this CLIP is that of {here}. Wire the CLIP of a checkpoint of the adapter's "
            "family, or use an adapter that was made for this one."
        )


def reference_norms(clip: Any, count: int) -> dict[str, Tensor]:
    """Return the norms of the text states at positions 1..count for a well-known name, per encoder: (count,) each.

    They are the reference length of identity tokens (UniID). The input is the mean embedding of the first, second, … tokens of the
    names, encoded between BOS and EOS by this CLIP, with its LoRAs and its last-layer setting. Cached per state of the CLIP.
    """
    per_model = _reference_norms.setdefault(clip.cond_stage_model, {})
    key = (clip.patcher.patches_uuid, clip.layer_idx, count)
    if key not in per_model:
        per_model[key] = _measure_norms(clip, count)
    return per_model[key]


def _measure_norms(clip: Any, count: int) -> dict[str, Tensor]:
    empty = clip.tokenize("")
    clip.load_model(empty)
    device = clip.patcher.load_device
    tokens = {}
    for encoder, rows in empty.items():
        tokenizer = getattr(clip.tokenizer, f"clip_{encoder}")
        ids = [tokenizer.tokenizer(name)["input_ids"][1:-1] for name in reference_names()]
        embed = _embeddings(clip, encoder)
        vectors = []
        for position in range(min(count, max(map(len, ids)))):
            at_position = torch.tensor(
                [name[position] for name in ids if len(name) > position], device=device
            )
            vectors.append((embed(at_position, out_dtype=torch.float32).mean(dim=0), 1.0))
        # Positions beyond the longest name repeat its last vector.
        vectors += vectors[-1:] * (count - len(vectors))
        row = rows[0]
        tokens[encoder] = [[row[0], *vectors, *row[1:]][: len(row)]]
    states = clip.encode_from_tokens(tokens, return_dict=True)["cond"][0, 1 : 1 + count].float()
    widths = encoder_widths(clip)
    parts = states.split(list(widths.values()), dim=-1)
    return {encoder: part.norm(dim=-1).cpu() for encoder, part in zip(widths, parts, strict=True)}


def complete_prompt(clip: Any, text: str, identity: Identity, class_word: str) -> str:
    """Return the text to encode, with the identity clause appended if the identity needs its word and the text lacks it."""
    if text_kind(identity) != "word" or not identity.text_tokens:
        return text
    require_text_encoders(clip, identity)
    tokens = clip.tokenize(text)
    if any(_word_positions(clip, encoder, tokens[encoder]) for encoder in identity.text_tokens):
        return text
    return with_identity_clause(text, class_word)


def encode_prompt(
    clip: Any, text: str, identity: Identity, token_weight: float, node_id: str | None = None
) -> Conditioning:
    """Encode a text with the identity in it.

    Args:
        token_weight: weight of the identity's tokens.
        node_id: the node of this prompt, which shows messages about it; None outside a queued prompt.
    """
    encoded = _encode(clip, text, identity, token_weight)
    if node_id is None:
        return encoded
    mark = {PROMPTED: Prompted(identity.adapter, node_id)}
    return [[states, {**options, **mark}] for states, options in encoded]


def _encode(clip: Any, text: str, identity: Identity, token_weight: float) -> Conditioning:
    if not identity.text_tokens:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
    require_text_encoders(clip, identity)
    if text_kind(identity) == "word":
        return _encode_with_word(clip, text, identity, token_weight)
    return _encode_with_tokens(clip, text, identity, token_weight)


def _encode_with_word(clip: Any, text: str, identity: Identity, token_weight: float) -> Conditioning:
    """Encode a text with each identifier token replaced by the identity's embeddings.

    Replacing tokens keeps the row lengths of the tokenizer and any prompt weight on the word. `token_weight` multiplies that
    prompt weight.
    """
    count = next(t.shape[1] for t in identity.text_tokens.values())
    if count > 1:  # one word per embedding, so that the tokenizer makes room for all of them
        words = " ".join([IDENTIFIER] * count)
        text = _IDENTIFIER.sub(lambda found: found[1] or words, text)
    tokens = clip.tokenize(text)
    for encoder, embeddings in identity.text_tokens.items():
        rows = [list(row) for row in tokens[encoder]]
        for row, position, number in _word_positions(clip, encoder, rows):
            weight = rows[row][position][1] * token_weight
            rows[row][position] = (embeddings[0, number % count].float().cpu(), weight)
        tokens[encoder] = rows
    return clip.encode_from_tokens_scheduled(tokens)


def _word_positions(clip: Any, encoder: str, rows: list[Any]) -> list[tuple[int, int, int]]:
    """Return (row, position, number of identifiers directly before it) of each identifier token.

    The end of a longer word can have the same token, but does not count. Words and sequences of words may continue in the next row.
    """
    tokenizer = getattr(clip.tokenizer, f"clip_{encoder}")
    identifier = tokenizer.tokenizer(IDENTIFIER)["input_ids"][1]
    found = []
    word_begins, before = True, 0
    for number, row in enumerate(rows):
        for position, (entry, *_) in enumerate(row):
            token = entry if isinstance(entry, int) else None  # an embedding is a vector
            if token == tokenizer.start_token:
                continue
            if token == tokenizer.end_token:
                break  # the rest is padding
            if token == identifier and word_begins:
                found.append((number, position, before))
                before += 1
            else:
                before = 0
            word_begins = token is None or str(tokenizer.inv_vocab.get(token, "</w>")).endswith("</w>")
    return found


def _encode_with_tokens(clip: Any, text: str, identity: Identity, token_weight: float) -> Conditioning:
    """Insert the identity's text tokens, at their reference length, after BOS.

    The prompt's tokens move right and padding drops off the end, so the length stays a multiple of 77. With too little padding
    the text gets another chunk of 77 first, so no part of the prompt is lost.
    """
    tokens = clip.tokenize(text)
    count = next(t.shape[1] for t in identity.text_tokens.values())
    if min(_padding(clip, encoder, rows[-1]) for encoder, rows in tokens.items()) < count:
        empty = clip.tokenize("")
        tokens = {encoder: [*rows, *empty[encoder]] for encoder, rows in tokens.items()}
    identity_states = normalize_text_tokens(identity.text_tokens, reference_norms(clip, count)) * token_weight
    positions = tuple(range(1, 1 + count))
    result = []
    for states, options in clip.encode_from_tokens_scheduled(tokens):
        inserted = identity_states.to(states).expand(states.shape[0], -1, -1)
        states = torch.cat([states[:, :1], inserted, states[:, 1 : states.shape[1] - count]], dim=1)
        result.append([states, {**options, TEXT_POSITIONS: positions}])
    return result


def _padding(clip: Any, encoder: str, row: list[Any]) -> int:
    """Count the positions after the end token of a tokenised row."""
    end = getattr(clip.tokenizer, f"clip_{encoder}").end_token
    position = next(i for i, entry in enumerate(row) if not isinstance(entry[0], Tensor) and entry[0] == end)
    return len(row) - 1 - position


def scaled_states(conds: list[Any], run: Run, timestep: Tensor) -> list[Any]:
    """Return the conditionings with the identity's text tokens multiplied by the scale of the current step."""
    rescale = run.plan.rescaling
    if rescale is None or not any(text_positions(c) for group in conds for c in group or ()):
        return conds
    scale = rescale.schedule.text_scale(run.step(float(timestep.max())), run.steps)

    def scaled(conditioning: dict[str, Any]) -> dict[str, Any]:
        positions = text_positions(conditioning)
        text = conditioning.get("model_conds", {}).get("c_crossattn")
        if not positions or scale == 1 or text is None:
            return conditioning
        states = text.cond.clone()
        states[:, positions[0] : positions[-1] + 1] *= scale
        model_conds = {**conditioning["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(states)}
        return {**conditioning, "model_conds": model_conds}

    return [None if group is None else [scaled(c) for c in group] for group in conds]


def tags_of(conditioning: dict[str, Any]) -> RowTags[Run] | None:
    """Return the row tags of a conditioning, or None if it belongs to no run."""
    tags = conditioning.get("model_conds", {}).get(KEY)
    return tags if isinstance(tags, RowTags) else None


def text_positions(conditioning: dict[str, Any]) -> tuple[int, ...]:
    """Return the positions of an identity's text tokens in a conditioning of a run."""
    # From the tags, not from the conditioning itself: for an area ComfyUI creates a negative with the keys of the positive, but
    # model_conds of a real negative.
    tags = tags_of(conditioning)
    return () if tags is None else tags.text_positions
