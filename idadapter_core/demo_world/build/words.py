"""`python -m idadapter_core.demo_world.build.words TOKENIZER OUT.json`: the tokens of the words that captions are made of.

TOKENIZER is a folder with CLIP's `vocab.json` and `merges.txt`, such as `comfy/sd1_tokenizer` of ComfyUI. The result is shipped; it has to be made
again only when captions get new words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ...extra import require
from ..captions import vocabulary

OTHERS = (",", ".", "sks", "person")  # what prompts hold besides words of captions


def tokens_of_words(tokenizer_folder: Path) -> dict[str, list[int]]:
    """Tokens without begin and end, by word."""
    tokenizer = require("transformers").CLIPTokenizer.from_pretrained(
        str(tokenizer_folder), local_files_only=True
    )
    return {word: list(tokenizer(word)["input_ids"][1:-1]) for word in sorted({*vocabulary(), *OTHERS})}


if __name__ == "__main__":
    lines = [
        f"{json.dumps(word)}: {json.dumps(ids)}" for word, ids in tokens_of_words(Path(sys.argv[1])).items()
    ]
    Path(sys.argv[2]).write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8", newline="\n")
