"""Encodes prompts with the frozen text encoders of a base model, in the same way as ComfyUI.

The output layer and the padding depend on the family of the base model:

| family | encoder       | states                                        | padding   |
|--------|---------------|-----------------------------------------------|-----------|
| SD1.5  | l, CLIP-L     | last layer, final norm                        | end token |
| SD2.1  | h, OpenCLIP-H | last layer but one, final norm                | token 0   |
| SDXL   | l, CLIP-L     | last layer but one, no norm                   | end token |
|        | g, OpenCLIP-G | last layer but one, no norm; pooled: the end token's last state, projected | token 0 |

SD2.1's encoder is used as published for diffusers, without the unused last layer, so its own last layer is the last but one.

Prompts are plain text: parentheses and numbers have no special meaning, while ComfyUI reads `(a cat:1.2)` as a weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError, MismatchError
from ..mechanisms.text import IDENTIFIER, reference_names

LENGTH = 77  # positions, including the begin and end tokens


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Encoded prompts for the UNet."""

    states: Tensor  # (B, 77, D); SDXL: those of l and g, concatenated
    pooled: Tensor | None = None  # (B, P); SDXL only


class TextEncoders(nn.Module):
    """The text encoders and tokenizers of a base model."""

    def __init__(self, family: str, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        """
        Args:
            family: sd15, sd21 or sdxl.
            models: transformers' CLIPTextModel by encoder ("l", "g", "h"), in the order of their concatenated states; for g a
                CLIPTextModelWithProjection.
            tokenizers: transformers' CLIPTokenizer for each of them.
        """
        super().__init__()
        self.family = family
        self.models = nn.ModuleDict(models)
        self.tokenizers = dict(tokenizers)
        self._reference_norms: dict[int, dict[str, Tensor]] = {}

    @property
    def widths(self) -> dict[str, int]:
        """Width of each encoder, in the order of the concatenated states."""
        return {name: self._embedding(name).embedding_dim for name in self.models}

    def encode(self, prompts: Sequence[str], word: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts, in the encoders' dtype and on their device.

        Args:
            prompts: B texts.
            word: the identity's embeddings for each encoder, (1 or B, n, width). Each identifier that is a separate word is replaced
                by these n embeddings. Gradients flow to them. Without `word` the identifier is an ordinary word.

        Raises:
            InputError: a prompt is too long for the 77 positions, or `word` is given and a prompt has no identifier.
            MismatchError: `word` is for other encoders.
        """
        if word is not None:
            self._require_word(word, len(prompts))
        states, pooled = [], None
        for name in self.models:
            given = None if word is None else word[name]
            tokens, number = self._tokenize(name, prompts, None if given is None else given.shape[1])
            replacement = None
            if given is not None:
                rows = given.expand(len(prompts), -1, -1).to(tokens.device)
                replacement = rows.gather(1, number.clamp_min(0)[..., None].expand(-1, -1, rows.shape[2]))
            found, pooled = self._run(name, tokens, number >= 0, replacement)
            states.append(found)
        return Conditioning(torch.cat(states, dim=-1), pooled)

    def has_identifier(self, prompt: str) -> bool:
        """Return whether the prompt contains the identifier as a separate word, which an identity can replace."""
        name = next(iter(self.models))
        _, numbers = self._with_word(name, self._ids(name, prompt), 1)
        return any(number >= 0 for number in numbers)

    def length(self, prompt: str) -> int:
        """Count the tokens of a prompt, without begin and end: the largest count of any encoder."""
        return max(len(self._ids(name, prompt)) for name in self.models)

    def shortened(self, prompt: str, spare: int = 0) -> str:
        """Shorten a prompt to the leading words that leave room for `spare` tokens. A shorter prompt is unchanged."""
        room = LENGTH - 2 - spare
        if self.length(prompt) <= room:
            return prompt
        words, space = prompt.split(), " "
        if self.length(words[0]) > room:  # a script without spaces between words
            words, space = list(prompt), ""
        ends = range(1, len(words) + 1)
        fitting = bisect_right(ends, room, key=lambda end: self.length(space.join(words[:end])))
        return space.join(words[:fitting])

    def reference_norms(self, count: int) -> dict[str, Tensor]:
        """Return the norms of the text states at positions 1..count for a well-known name: (count,) fp32 on the CPU, per encoder.

        They are the reference length of identity tokens (UniID). The input is the mean embedding of the first, second, … tokens of
        the names, encoded between BOS and EOS.
        """
        if count not in self._reference_norms:
            self._reference_norms[count] = {name: self._measure_norms(name, count) for name in self.models}
        return self._reference_norms[count]

    @torch.no_grad()
    def _measure_norms(self, name: str, count: int) -> Tensor:
        embedding = self._embedding(name)
        ids = [self._ids(name, text) for text in reference_names()]
        means = []
        for position in range(min(count, max(map(len, ids)))):
            at_position = [entry[position] for entry in ids if len(entry) > position]
            means.append(
                embedding.weight[torch.tensor(at_position, device=embedding.weight.device)].float().mean(0)
            )
        means += means[-1:] * (count - len(means))  # positions beyond the longest name repeat its last vector
        begin, end = self._ends(name)
        row = [begin, *[end] * count, end]
        tokens = torch.tensor([self._pad(name, row)], device=embedding.weight.device)
        places = torch.zeros_like(tokens, dtype=torch.bool)
        places[:, 1 : 1 + count] = True
        replacement = torch.zeros(1, LENGTH, embedding.embedding_dim, device=embedding.weight.device)
        replacement[0, 1 : 1 + count] = torch.stack(means)
        states, _ = self._run(name, tokens, places, replacement)
        lengths: Tensor = states[0, 1 : 1 + count].float().norm(dim=-1)
        return lengths.cpu()

    def _run(
        self, name: str, tokens: Tensor, places: Tensor, replacement: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode token ids (B, 77) to states (B, 77, width) and, for the encoder g, pooled states (B, P).

        Where `places` (B, 77) is true, `replacement` (B, 77, width) replaces the token embeddings. A hook inserts them, because the
        networks of transformers 5 accept token ids only.
        """
        model: Any = self.models[name]

        def replace(module: nn.Module, given: Any, embedded: Tensor) -> Tensor | None:
            return (
                None if replacement is None else embedded.where(~places[..., None], replacement.to(embedded))
            )

        handle = self._embedding(name).register_forward_hook(replace)
        try:
            output = model(input_ids=tokens, output_hidden_states=self.family == "sdxl")
        finally:
            handle.remove()
        if self.family != "sdxl":
            return output.last_hidden_state, None
        pooled = None
        if name == "g":
            _, end = self._ends(name)
            first_end = (tokens == end).int().argmax(dim=1)
            rows = torch.arange(len(tokens), device=tokens.device)
            pooled = model.text_projection(output.last_hidden_state[rows, first_end])
        return output.hidden_states[-2], pooled

    def _tokenize(self, name: str, prompts: Sequence[str], count: int | None) -> tuple[Tensor, Tensor]:
        """Return token ids (B, 77), and for each the index (B, 77) of the word embedding that replaces it, -1 for none."""
        begin, end = self._ends(name)
        tokens, numbers = [], []
        for prompt in prompts:
            ids, number = self._ids(name, prompt), None
            if count is not None:
                ids, number = self._with_word(name, ids, count)
                if not any(entry >= 0 for entry in number):
                    raise InputError(
                        f"the prompt {_short(prompt)} has no word {IDENTIFIER!r} of its own, whose place the identity could take. "
                        f"Add it, for example as 'a photo of a person, person is {IDENTIFIER}'."
                    )
            if len(ids) > LENGTH - 2:
                raise InputError(
                    f"the prompt {_short(prompt)} has {len(ids)} tokens; training uses {LENGTH - 2} at most. Shorten it."
                )
            tokens.append(self._pad(name, [begin, *ids, end]))
            numbers.append([-1, *(number or []), *[-1] * LENGTH][:LENGTH])
        device = self._embedding(name).weight.device
        return torch.tensor(tokens, device=device), torch.tensor(numbers, device=device)

    def _with_word(self, name: str, ids: Sequence[int], count: int) -> tuple[list[int], list[int]]:
        """Repeat each identifier `count` times. Return the ids, and for each the index of its embedding, -1 for none.

        The end of a longer word can have the same token, but is not an identifier.
        """
        identifier = self._identifier(name)
        pieces = self.tokenizers[name].convert_ids_to_tokens(list(ids))
        expanded, numbers = [], []
        word_begins = True
        for token, piece in zip(ids, pieces, strict=True):
            found = token == identifier and word_begins
            expanded += [token] * (count if found else 1)
            numbers += list(range(count)) if found else [-1]
            word_begins = str(piece).endswith("</w>")
        return expanded, numbers

    def _identifier(self, name: str) -> int:
        ids = self._ids(name, IDENTIFIER)
        if len(ids) != 1:
            raise ConfigError(
                f"the tokenizer of the text encoder {name} splits {IDENTIFIER!r} into {len(ids)} tokens, so the identity has no "
                "place in prompts. Use the tokenizer of CLIP."
            )
        return ids[0]

    def _ids(self, name: str, text: str) -> list[int]:
        ids: list[int] = self.tokenizers[name](text, verbose=False)["input_ids"]
        return ids[1:-1]

    def _ends(self, name: str) -> tuple[int, int]:
        tokenizer = self.tokenizers[name]
        return tokenizer.bos_token_id, tokenizer.eos_token_id

    def _pad(self, name: str, row: list[int]) -> list[int]:
        padding = self._ends(name)[1] if name == "l" else 0
        return [*row, *[padding] * (LENGTH - len(row))]

    def _embedding(self, name: str) -> nn.Embedding:
        model: Any = self.models[name]
        embedding: nn.Embedding = model.get_input_embeddings()
        return embedding

    def _require_word(self, word: Mapping[str, Tensor], rows: int) -> None:
        found = {name: embeddings.shape[-1] for name, embeddings in word.items()}
        if found != self.widths:
            raise MismatchError(
                f"the identity's word is for text encoders of widths {found}, the base model has {self.widths}. Use the adapter "
                "and the base model of one family."
            )
        shapes = [tuple(embeddings.shape) for embeddings in word.values()]
        if any(len(shape) != 3 or shape[0] not in (1, rows) or shape[1] < 1 for shape in shapes):
            raise InputError(
                f"the identity's word must have the shape (1 or {rows}, n, width) for each encoder, got {shapes}"
            )


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}…")
