"""The demo world reads prompts as ComfyUI's CLIP tokenizer does."""

from __future__ import annotations

import numpy as np

from idadapter_core.demo_world import Factors, Person, caption
from idadapter_core.demo_world.words import words


def test_captions_are_the_tokens_of_the_real_tokenizer() -> None:
    import comfy.sd1_clip

    tokenizer = comfy.sd1_clip.SDTokenizer()
    known = words().known
    rng = np.random.default_rng(0)
    for number in range(60):
        text = caption(Person.sample(number), Factors.sample(rng), word="sks" if number % 3 == 0 else None)
        theirs = [token for token, *_ in tokenizer.tokenize_with_weights(text)[0]]
        assert [known[row] for row in words().rows(text)] == theirs, text
