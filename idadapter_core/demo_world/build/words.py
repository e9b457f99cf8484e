"""Writes the tokens of the words of captions. The file is shipped; it changes only when captions get new words."""

from __future__ import annotations

import json
from pathlib import Path

from ...extra import require
from ...files import replacing
from ..captions import vocabulary

OTHERS = (",", ".", "sks", "person")  # words of prompts that captions do not use


def tokens_of_words(tokenizer_folder: Path) -> dict[str, list[int]]:
    """Return the tokens of each word, without begin and end."""
    tokenizer = require("transformers").CLIPTokenizer.from_pretrained(
        str(tokenizer_folder), local_files_only=True
    )
    return {word: list(tokenizer(word)["input_ids"][1:-1]) for word in sorted({*vocabulary(), *OTHERS})}


def write_words(tokenizer_folder: Path, output: Path) -> None:
    """Write the file that `words()` reads, a line for each word."""
    found = tokens_of_words(tokenizer_folder)
    lines = [f"{json.dumps(word)}: {json.dumps(tokens)}" for word, tokens in found.items()]
    with replacing(output) as file:
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8", newline="\n")
