"""Captions as the tokens of CLIP's tokenizer, of which the demo world knows few: each has a row of its own in a small table."""

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
    """Which tokens CLIP's tokenizer makes of the words that captions are made of."""

    tokens: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def known(self) -> tuple[int, ...]:
        """The tokens that have rows of their own: begin, end, then those of all words in rising order."""
        used = {token for tokens in self.tokens.values() for token in tokens}
        return (BEGIN, END, *sorted(used))

    @functools.cached_property
    def _row_of(self) -> dict[int, int]:
        return {token: row for row, token in enumerate(self.known)}

    @property
    def unknown(self) -> int:
        """The row of all other tokens, the last one."""
        return len(self.known)

    def rows(self, text: str, unknown_before: Sequence[int] = ()) -> list[int]:
        """The rows (77) of a text in the small table: begin, words, and ends to fill up. What is too long is cut off.

        Args:
            unknown_before: numbers of words before which a word that nobody knows is put.
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
    """Those of the shipped file."""
    content: dict[str, list[int]] = json.loads(shipped(FILE).read_text("utf-8"))
    return Words({word: tuple(tokens) for word, tokens in content.items()})
