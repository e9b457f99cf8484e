"""Identities in prompts: tokens in the text encoder's output, or a word in its input."""

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

# The identifier as the tokenizer sees words: letters go on with one, digits and underscores do not, and 's is one of its own.
# The name of an embedding file comes first, because it is no text.
_IDENTIFIER = re.compile(
    rf"((?<![^\s()])embedding:[^\s()<\[]+)|(?<!')(?<![^\W\d_])(?i:{IDENTIFIER})(?![^\W\d_])"
)

_reference_norms: WeakKeyDictionary[Any, dict[Any, dict[str, Tensor]]] = WeakKeyDictionary()


def encoder_widths(clip: Any) -> dict[str, int]:
    """Width of each text encoder of a CLIP, in the order in which their states are concatenated; 0 where it is no CLIP text model."""
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
    """Length of the text states at positions 1..count for a well-known name, per encoder: (count,) each.

    The reference of identity tokens (UniID): the mean input embedding of first, second, … tokens over the names, encoded between BOS and EOS by the
    CLIP as it is wired here (with its LoRAs and its last layer). Cached for each state of the CLIP.
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
        # Positions that no name reaches are like the last that one does.
        vectors += vectors[-1:] * (count - len(vectors))
        row = rows[0]
        tokens[encoder] = [[row[0], *vectors, *row[1:]][: len(row)]]
    states = clip.encode_from_tokens(tokens, return_dict=True)["cond"][0, 1 : 1 + count].float()
    widths = encoder_widths(clip)
    parts = states.split(list(widths.values()), dim=-1)
    return {encoder: part.norm(dim=-1).cpu() for encoder, part in zip(widths, parts, strict=True)}


def complete_prompt(clip: Any, text: str, identity: Identity, class_word: str) -> str:
    """The text as it will be encoded: an identity word must be in it, and is added at the end where it is not."""
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
    """The text's conditioning with the identity in it.

    Args:
        token_weight: how much its tokens count.
        node_id: the node whose prompt it is, where messages about it are shown; None outside a queued prompt.
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
    """Wherever the identifier stands, the text encoder reads the identity's embeddings instead of the word's own.

    They take the place of tokens, so the tokenizer has seen to the length of rows, and a prompt weight on the word holds for
    them. `token_weight` is a prompt weight, too, and multiplies it.
    """
    count = next(t.shape[1] for t in identity.text_tokens.values())
    if count > 1:  # as many words as there are embeddings, so that the tokenizer makes room for them
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
    """(row, position, how many stand directly before it) of each identifier among tokens.

    The end of a longer word has the same token and is none. Words, and words side by side, may go on in the next row.
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
    """The identity's text tokens after BOS, at their reference length.

    The prompt's tokens move right and padding drops off the end, so the length stays a multiple of 77 and nothing that was
    written is lost: where there is too little padding, the text gets another chunk of 77 first.
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
    """How many positions of a tokenised row come after its end token."""
    end = getattr(clip.tokenizer, f"clip_{encoder}").end_token
    position = next(i for i, entry in enumerate(row) if not isinstance(entry[0], Tensor) and entry[0] == end)
    return len(row) - 1 - position


def scaled_states(conds: list[Any], run: Run, timestep: Tensor) -> list[Any]:
    """The conditionings with the identity's text tokens at the scale of their step."""
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
    """The tags of a conditioning of a run."""
    tags = conditioning.get("model_conds", {}).get(KEY)
    return tags if isinstance(tags, RowTags) else None


def text_positions(conditioning: dict[str, Any]) -> tuple[int, ...]:
    """Where an identity's text tokens stand in a conditioning of a run."""
    # From the tags, not from the conditioning itself: ComfyUI copies a positive's own keys onto the negative it makes up for
    # an area, but its model_conds always come from a negative.
    tags = tags_of(conditioning)
    return () if tags is None else tags.text_positions
