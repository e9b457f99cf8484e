"""Tokenises prompts for the text encoder, whose small embedding table has rows only for the tokens that captions use."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .shipped import shipped

LENGTH = 77  # tokens, with begin and end
BEGIN, END = 49406, 49407
VOCABULARY = 49408
FILE = "words.json"
_PIECE = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")


@dataclass(frozen=True)
class Words:
    """The tokens of CLIP's tokenizer for each word of captions."""

    tokens: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def known(self) -> tuple[int, ...]:
        """The tokens with rows in the table, in the order of the rows: begin, end, then the tokens of all words, ascending."""
        used = {token for tokens in self.tokens.values() for token in tokens}
        return (BEGIN, END, *sorted(used))

    @functools.cached_property
    def _row_of(self) -> dict[int, int]:
        return {token: row for row, token in enumerate(self.known)}

    @property
    def unknown(self) -> int:
        """Row of all other tokens: the last one."""
        return len(self.known)

    def rows(self, text: str, unknown_before: Sequence[int] = ()) -> list[int]:
        """Return the 77 rows of a text in the table: begin, words, and end as padding. Longer texts are cut off.

        Args:
            unknown_before: numbers of the words before which an unknown word is inserted.
        """
        found: list[int] = []
        for number, piece in enumerate(_PIECE.findall(text.lower())):
            found += [self.unknown] * unknown_before.count(number)
            tokens = self.tokens.get(piece)
            found += [self.unknown] if tokens is None else [self._row_of[token] for token in tokens]
        found = found[: LENGTH - 2]
        return [0, *found, *[1] * (LENGTH - 1 - len(found))]


@functools.cache
def words() -> Words:
    """Return the words of the shipped file. The result is cached."""
    content: dict[str, list[int]] = json.loads(shipped(FILE).read_text("utf-8"))
    return Words({word: tuple(tokens) for word, tokens in content.items()})
