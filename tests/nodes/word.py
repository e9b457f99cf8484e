"""The identifier word in a prompt: an identity's embeddings, ID Prompt, and CLIP Text Encode with a CLIP that has learnt the word."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.golden import recipe
from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import Conditioning
from tests.tiny.checkpoints import tiny_clip

SKS = 48136
"""Token id of the identifier."""
CAT, DOG = 2368, 1929
WIDTH = 64
ENCODERS = {"sd15": ("l",), "sd21": ("h",), "sdxl": ("l", "g")}
KINDS = tuple(ENCODERS)
PLAIN_TEXT = "portrait of sks in a cafe"
POSITION = 3  # of the word in it


@functools.cache
def clip(kind: str) -> Any:
    """The tiny CLIP of that kind. Shared: no test may change it."""
    return tiny_clip(kind)


def table(some_clip: Any, encoder: str) -> Tensor:
    """The embeddings of all tokens, (49408, width)."""
    model = getattr(some_clip.cond_stage_model, f"clip_{encoder}")
    weight: Tensor = model.transformer.get_input_embeddings().weight
    return weight


def vectors(kind: str, count: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Embeddings of the length of words, per encoder (1, count, width)."""
    return {
        encoder: recipe.value(seed, f"word.{encoder}", (1, count, WIDTH)) / WIDTH**0.5
        for encoder in ENCODERS[kind]
    }


def person(kind: str, count: int = 1, seed: int = 0, class_word: str = "", **embeddings: Tensor) -> Any:
    """An identity with a word, as IDAdapter makes them; `embeddings` in place of those of an encoder."""
    from ComfyUI_IDAdapter.idadapter_core import Identity

    return Identity(
        adapter_tokens=recipe.value(seed, "person", (1, 4, WIDTH)),
        adapter_tokens_uncond=None,
        text_tokens={**vectors(kind, count, seed), **embeddings},
        method="idadapter",
        adapter="0123456789abcdef",
        class_word=class_word,
    )


def id_prompt(
    with_clip: Any, identity: Any, text: str, class_word: str = "auto", token_weight: float = 1.0
) -> tuple[Conditioning, str]:
    """ID Prompt: its conditioning and the prompt as encoded."""
    with torch.inference_mode():
        output = pack_nodes()["IDAdapterPrompt"].execute(with_clip, identity, text, class_word, token_weight)
    conditioning, encoded = output.result
    return conditioning, encoded


def text_encode(with_clip: Any, text: str) -> Conditioning:
    """CLIP Text Encode."""
    from nodes import CLIPTextEncode

    with torch.inference_mode():
        conditioning: Conditioning = CLIPTextEncode().encode(with_clip, text)[0]
    return conditioning


def teach(some_clip: Any, words: Mapping[int, int], identity: Any) -> Any:
    """The CLIP itself, in whose tables the tokens (id: number of the embedding) now are the identity's embeddings."""
    with torch.no_grad():
        for encoder, embeddings in identity.text_tokens.items():
            for token, number in words.items():
                table(some_clip, encoder)[token] = embeddings[0, number]
    return some_clip


@functools.cache
def taught(kind: str, count: int = 1, seed: int = 0) -> Any:
    """A CLIP that has learnt the word of `person(kind, count, seed)`: sks, or cat and dog where it has two embeddings."""
    words = {SKS: 0} if count == 1 else {CAT: 0, DOG: 1}
    return teach(tiny_clip(kind), words, person(kind, count, seed))


def assert_same(one: Conditioning, other: Conditioning) -> None:
    """Bit for bit, with all that a conditioning holds."""
    ((states, options),), ((expected, expected_options),) = one, other
    assert torch.equal(states, expected)
    assert options.keys() == expected_options.keys()
    for key, value in expected_options.items():
        same = torch.equal(options[key], value) if isinstance(value, Tensor) else options[key] == value
        assert same, key


def states_of(conditioning: Conditioning) -> Tensor:
    """(positions, width)."""
    ((states, _),) = conditioning
    return states[0]


def changed_positions(one: Conditioning, other: Conditioning, columns: slice = slice(None)) -> list[int]:
    difference = (states_of(one) - states_of(other))[:, columns].abs().amax(dim=1)
    return difference.gt(1e-5).nonzero()[:, 0].tolist()


def cats(count: int) -> str:
    return " ".join(["cat"] * count)
