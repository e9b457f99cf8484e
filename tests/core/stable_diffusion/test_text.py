"""Prompts through the text encoders: layers and padding, the identity's place in them, what is refused.

That the states are ComfyUI's is tested in `tests/nodes/test_training_parity.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.errors import ConfigError, InputError, MismatchError
from idadapter_core.stable_diffusion.base import load_base
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.inject.text import insert_tokens
from idadapter_core.stable_diffusion.text import LENGTH, TextEncoders
from tests.golden import recipe
from tests.tiny.bases import KINDS, WIDTH, diffusers_base

ENCODERS = {"sd15": ("l",), "sd21": ("h",), "sdxl": ("l", "g")}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def text(kind: str) -> TextEncoders:
    return load_base(BaseConfig(path=str(diffusers_base(kind)), family=kind)).text


def word(text: TextEncoders, rows: int = 1, count: int = 1) -> dict[str, Tensor]:
    return {
        name: recipe.value(0, f"word.{name}", (rows, count, width)) / width**0.5
        for name, width in text.widths.items()
    }


def test_shapes(kind: str, text: TextEncoders) -> None:
    found = text.encode(["a photo of a man", "", "a cat"])
    assert found.states.shape == (3, LENGTH, WIDTH * len(ENCODERS[kind]))
    assert (None if found.pooled is None else found.pooled.shape) == ((3, WIDTH) if kind == "sdxl" else None)
    assert text.widths == dict.fromkeys(ENCODERS[kind], WIDTH)


def test_a_batch_is_its_prompts_one_by_one(text: TextEncoders) -> None:
    prompts, embeddings = ["sks", "a man is sks, sks sks", "a zxsks of sks"], word(text, rows=3, count=2)
    together = text.encode(prompts, embeddings)
    for row, prompt in enumerate(prompts):
        own = {name: value[row : row + 1] for name, value in embeddings.items()}
        torch.testing.assert_close(
            together.states[row : row + 1], text.encode([prompt], own).states, atol=1e-5, rtol=0
        )
    shared = text.encode(prompts, {name: value[:1] for name, value in embeddings.items()})
    torch.testing.assert_close(shared.states[0], together.states[0], atol=1e-5, rtol=0)
    assert (shared.states[1] - together.states[1]).abs().max() > 0.01


def own_embedding(text: TextEncoders, prompt: str) -> dict[str, Tensor]:
    """The embedding of a word of one token, as an identity's word."""
    found = {}
    for name, model in text.models.items():
        model_: Any = model
        token = text.tokenizers[name](prompt)["input_ids"][1]
        found[name] = model_.get_input_embeddings().weight[token][None, None]
    return found


@pytest.mark.parametrize(
    ("prompt", "read_as"),
    [
        ("sks", "cat"),
        ("a man is sks, of sks", "a man is cat, of cat"),
        ("Sks1 (sks)", "cat1 (cat)"),
        ("desks and zxsks, sks", "desks and zxsks, cat"),
        ("sks sks sks", "cat cat cat"),
        ("sks's", "cat's"),
    ],
)
def test_the_identity_takes_the_place_of_its_word_only(prompt: str, read_as: str, text: TextEncoders) -> None:
    assert text.has_identifier(prompt)
    found = text.encode([prompt], own_embedding(text, "cat"))
    expected = text.encode([read_as])
    assert torch.equal(found.states, expected.states)
    if expected.pooled is not None:
        assert found.pooled is not None
        assert torch.equal(found.pooled, expected.pooled)


def test_several_embeddings_take_as_many_places(text: TextEncoders) -> None:
    cat, man = own_embedding(text, "cat"), own_embedding(text, "man")
    both = {name: torch.cat([cat[name], man[name]], dim=1) for name in cat}
    found = text.encode(["a photo of sks sks is sks"], both)
    assert torch.equal(found.states, text.encode(["a photo of cat man cat man is cat man"]).states)


def test_without_an_identity_its_word_is_a_word(text: TextEncoders) -> None:
    own = own_embedding(text, "sks")
    assert torch.equal(text.encode(["a sks"]).states, text.encode(["a sks"], own).states)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_word_and_nothing_else(autocast: bool, kind: str) -> None:
    narrow = torch.bfloat16
    text = load_base(BaseConfig(path=str(diffusers_base(kind)), family=kind), dtype=narrow).text
    embeddings = {name: value.requires_grad_() for name, value in word(text, rows=2).items()}
    with torch.autocast("cpu", narrow, enabled=autocast):
        found = text.encode(["a photo of sks", "sks"], embeddings)
    assert found.states.dtype is narrow
    found.states[:, 5:].float().square().sum().backward()
    for value in embeddings.values():
        assert value.grad is not None
        assert value.grad.flatten(1).norm(dim=1).min() > 0
    assert all(parameter.grad is None for parameter in text.parameters())


@pytest.mark.parametrize("prompt", ["a photo of a man", "desks", "zxsks", "sksks", ""])
def test_a_prompt_without_the_word_is_refused(prompt: str, text: TextEncoders) -> None:
    assert not text.has_identifier(prompt)
    with pytest.raises(InputError, match="has no word 'sks' of its own"):
        text.encode(["sks", prompt], word(text))


def test_a_refused_prompt_leaves_no_trace(text: TextEncoders) -> None:
    before = text.encode(["a cat"]).states
    embeddings = word(text)
    text.encode(["a sks"], embeddings)
    with pytest.raises(InputError):
        text.encode(["a cat"], embeddings)
    assert torch.equal(text.encode(["a cat"]).states, before)


def test_prompts_longer_than_training_uses_are_refused(text: TextEncoders) -> None:
    text.encode(["cat " * 75])
    with pytest.raises(InputError, match=r"'cat cat .*…' has 76 tokens; training uses 75 at most"):
        text.encode(["cat " * 76])
    text.encode(["cat " * 73 + "sks"], word(text, count=2))
    with pytest.raises(InputError, match="76 tokens"):
        text.encode(["cat " * 74 + "sks"], word(text, count=2))


def test_a_word_for_other_encoders_is_refused(text: TextEncoders) -> None:
    fitting = word(text)
    name = next(iter(fitting))
    for wrong in ({name: torch.ones(1, 1, WIDTH + 1)}, {"x": torch.ones(1, 1, WIDTH)}):
        with pytest.raises(MismatchError, match="the identity's word is for text encoders of widths"):
            text.encode(["sks"], wrong)
    with pytest.raises(InputError, match=r"must have the shape \(1 or 3, n, width\)"):
        text.encode(["sks"] * 3, word(text, rows=2))


def test_a_tokenizer_that_does_not_know_the_identifier_is_named(text: TextEncoders) -> None:
    class Letters:
        def __call__(self, prompt: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [0, *range(len(prompt)), 0]}

        def __getattr__(self, name: str) -> Any:
            return lambda ids: [str(entry) for entry in ids]

    name = next(iter(text.models))
    stranger = TextEncoders(text.family, {name: text.models[name]}, {name: Letters()})
    with pytest.raises(ConfigError, match="splits 'sks' into 3 tokens"):
        stranger.has_identifier("sks")


def test_well_known_names(text: TextEncoders) -> None:
    norms = text.reference_norms(3)
    assert {name: tuple(value.shape) for name, value in norms.items()} == dict.fromkeys(text.widths, (3,))
    assert all((value > 1).all() for value in norms.values())
    longer = text.reference_norms(4)
    assert all(torch.allclose(longer[name][:3], norms[name], atol=1e-4) for name in norms)


def test_tokens_go_after_the_first_position_and_the_end_drops_off() -> None:
    states = torch.arange(10.0).reshape(1, 5, 2).repeat(2, 1, 1)
    tokens = torch.full((1, 2, 2), -1.0, dtype=torch.float64, requires_grad=True)
    found = insert_tokens(states, tokens)
    assert found.shape == states.shape
    assert found.dtype is states.dtype
    assert found[1, :, 0].tolist() == [0, -1, -1, 2, 4]
    found.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.eq(2).all()
