"""ID Prompt with IDAdapter: the identity's embeddings in place of the identifier word, before the text encoder.

What is expected comes from ComfyUI alone: CLIP Text Encode with a CLIP whose embedding table holds the identity's vector as that
word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden import recipe
from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import Conditioning
from tests.tiny.checkpoints import tiny_clip
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features

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


# --- where the word stands ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_identifier_is_one_token(kind: str) -> None:
    for rows in clip(kind).tokenize("sks").values():
        assert [entry for entry, _ in rows[0][:3]] == [49406, SKS, 49407]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_encoder_reads_the_vector_in_place_of_the_word(kind: str) -> None:
    conditioning, encoded = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    assert encoded == PLAIN_TEXT
    assert_same(conditioning, text_encode(taught(kind), PLAIN_TEXT))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_follows_the_word_changes(kind: str) -> None:
    conditioning, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    plain = text_encode(clip(kind), PLAIN_TEXT)
    assert changed_positions(conditioning, plain) == list(range(POSITION, 77))
    assert not torch.equal(conditioning[0][1]["pooled_output"], plain[0][1]["pooled_output"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [PLAIN_TEXT, "(sks:1.3) and " + cats(90) + " sks"])
def test_the_words_own_embedding_is_the_plain_prompt(kind: str, text: str) -> None:
    own = {encoder: table(clip(kind), encoder)[SKS].clone()[None, None] for encoder in ENCODERS[kind]}
    conditioning, _ = id_prompt(clip(kind), person(kind, **own), text)
    assert_same(conditioning, text_encode(clip(kind), text))


@pytest.mark.parametrize(("encoder", "own"), [("l", slice(0, WIDTH)), ("g", slice(WIDTH, None))])
def test_each_text_encoder_of_sdxl_reads_its_own_vector(encoder: str, own: slice) -> None:
    one, other = person("sdxl"), person("sdxl", **{encoder: vectors("sdxl", seed=1)[encoder]})
    (first, _), (second, _) = (id_prompt(clip("sdxl"), each, PLAIN_TEXT) for each in (one, other))
    rest = slice(WIDTH, None) if encoder == "l" else slice(0, WIDTH)
    assert changed_positions(first, second, own) == list(range(POSITION, 77))
    assert torch.equal(states_of(first)[:, rest], states_of(second)[:, rest])
    # The pooled vector is G's.
    pooled = [conditioning[0][1]["pooled_output"] for conditioning in (first, second)]
    assert torch.equal(*pooled) == (encoder == "l")


@pytest.mark.parametrize("kind", KINDS)
def test_the_word_of_a_real_identity(kind: str) -> None:
    """From face features through an adapter."""
    word = tiny_idadapter(CONFIGS[kind]).encode(vision_features(3, 4)).text_tokens
    assert {name: tuple(tensor.shape) for name, tensor in word.items()} == dict.fromkeys(
        ENCODERS[kind], (1, 1, WIDTH)
    )
    identity = person(kind, **word)
    expected = teach(tiny_clip(kind), {SKS: 0}, identity)
    assert_same(id_prompt(clip(kind), identity, PLAIN_TEXT)[0], text_encode(expected, PLAIN_TEXT))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "text",
    [
        "sks",
        "sks and sks, sks",
        "a photo of sks sks",
        "Sks at the sea",
        "SKS",
        "a man,sks,in a park",
        "sks's dog",
        'a man called "sks"',
        "sks-like, sks2, 2sks, sks_b",
        "(zxq)sks",
    ],
)
def test_every_occurrence_is_replaced(kind: str, text: str) -> None:
    conditioning, encoded = id_prompt(clip(kind), person(kind), text)
    assert encoded == text
    assert_same(conditioning, text_encode(taught(kind), text))


@pytest.mark.parametrize("word", ["desks", "zxqsks", "asksb", "tasks", "qsks", "zqxsks", "sksé", "ésks"])
def test_longer_words_are_not_the_identifier(word: str) -> None:
    """Some of them end in its very token, which their first letters make another word of."""
    text = f"many {word} in a room"
    conditioning, encoded = id_prompt(clip("sd15"), person("sd15"), text)
    assert encoded == f"{text}, person is sks"
    plain = text_encode(clip("sd15"), encoded)
    (row,) = clip("sd15").tokenize(encoded)["l"]
    last = max(position for position, (token, _) in enumerate(row) if token == SKS)
    assert changed_positions(conditioning, plain) == list(range(last, 77))


def test_some_longer_words_end_in_the_identifiers_token() -> None:
    """Else the test above would prove nothing."""
    (row,) = clip("sd15").tokenize("zxqsks")["l"]
    assert SKS in [token for token, _ in row]


# --- prompt weights ---


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "text",
    ["a (sks:1.3) smiles", "a ((sks)) smiles", "a (big (sks:0.5) smile:1.4)", "(a (sks) with (hat:0.7))"],
)
def test_prompt_weights_hold_for_the_word(kind: str, text: str) -> None:
    conditioning, _ = id_prompt(clip(kind), person(kind), text)
    assert_same(conditioning, text_encode(taught(kind), text))
    flat, _ = id_prompt(clip(kind), person(kind), "a sks smiles")
    assert changed_positions(conditioning, flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "token_weight", "same_as"),
    [
        ("a photo of sks here", 1.5, "a photo of (sks:1.5) here"),
        ("a photo of (sks:0.5) here", 3.0, "a photo of (sks:1.5) here"),
        ("a (photo:1.2) of sks, sks", 0.5, "a (photo:1.2) of (sks:0.5), (sks:0.5)"),
    ],
)
def test_token_weight_multiplies_the_prompt_weight(
    kind: str, text: str, token_weight: float, same_as: str
) -> None:
    conditioning, encoded = id_prompt(clip(kind), person(kind), text, token_weight=token_weight)
    assert encoded == text
    assert_same(conditioning, text_encode(taught(kind), same_as))


@pytest.mark.parametrize("kind", KINDS)
def test_token_weight_0_leaves_nothing_at_the_words_place(kind: str) -> None:
    """As with any prompt weight, words after it have still read it."""
    conditioning, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT, token_weight=0.0)
    empty = states_of(text_encode(clip(kind), ""))
    torch.testing.assert_close(states_of(conditioning)[POSITION], empty[POSITION])
    full, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    assert changed_positions(conditioning, full) == [POSITION]


# --- long prompts ---


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("text", "rows", "changed"),
    [
        (f"sks {cats(100)}", 2, [range(1, 77)]),
        (f"{cats(74)} sks {cats(5)}", 2, [range(75, 77)]),
        (f"{cats(75)} sks {cats(5)}", 2, [range(78, 154)]),
        (f"{cats(100)} sks", 2, [range(103, 154)]),
        (f"sks {cats(98)} sks", 2, [range(1, 77), range(102, 154)]),
        (f"sks {cats(170)} sks", 3, [range(1, 77), range(176, 231)]),
        (f"{cats(80)} sks {cats(90)}", 3, [range(83, 154)]),
    ],
)
def test_the_word_in_any_row_of_a_long_prompt(kind: str, text: str, rows: int, changed: list[range]) -> None:
    """Each row of 77 is read by itself, so only rows with the word change, from its place on."""
    conditioning, encoded = id_prompt(clip(kind), person(kind), text)
    assert encoded == text
    assert states_of(conditioning).shape[0] == 77 * rows
    assert_same(conditioning, text_encode(taught(kind), text))
    expected = [position for part in changed for position in part]
    assert changed_positions(conditioning, text_encode(clip(kind), text)) == expected


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_clause_goes_to_the_end_of_a_long_prompt(kind: str) -> None:
    conditioning, encoded = id_prompt(clip(kind), person(kind), cats(75))
    assert encoded == f"{cats(75)}, person is sks"
    assert states_of(conditioning).shape[0] == 154
    assert_same(conditioning, text_encode(taught(kind), encoded))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("before", [72, 73, 74])
def test_a_longer_word_that_goes_on_in_the_next_row_is_not_the_identifier(kind: str, before: int) -> None:
    """The tokenizer breaks words at the end of a row: what is left of zxqsks there may be the identifier's token alone."""
    text = f"{cats(before)} zxqsks"
    rows = clip(kind).tokenize(text)["l"]
    assert SKS in [token for token, _ in rows[1]]
    conditioning, encoded = id_prompt(clip(kind), person(kind), text)
    assert encoded == f"{text}, person is sks"
    assert changed_positions(conditioning, text_encode(clip(kind), encoded))[0] > 78 + before - 72


# --- the clause ---


@pytest.mark.parametrize(
    ("text", "seen", "chosen", "encoded"),
    [
        ("a cat", "", "auto", "a cat, person is sks"),
        ("a cat", "woman", "auto", "a cat, woman is sks"),
        ("a cat", "woman", "man", "a cat, man is sks"),
        ("a cat", "", "girl", "a cat, girl is sks"),
        ("a <class word> reads", "woman", "auto", "a woman reads, woman is sks"),
        ("a <class word> reads, <class word> is sks", "woman", "boy", "a boy reads, boy is sks"),
        ("a <class word> and sks", "", "auto", "a person and sks"),
        ("", "man", "auto", "man is sks"),
        (" \n ", "", "auto", "person is sks"),
        ("a cat.", "", "auto", "a cat, person is sks"),
        ("a cat,", "", "auto", "a cat, person is sks"),
        ("a cat, ", "", "auto", "a cat, person is sks"),
        ("a cat;\n", "", "auto", "a cat, person is sks"),
        ("a cat!", "", "auto", "a cat!, person is sks"),
        ("a (cat:1.2)", "", "auto", "a (cat:1.2), person is sks"),
        ("a red,\nround cat", "", "auto", "a red,\nround cat, person is sks"),
    ],
)
def test_a_prompt_without_the_word_gets_a_clause(text: str, seen: str, chosen: str, encoded: str) -> None:
    conditioning, shown = id_prompt(clip("sd15"), person("sd15", class_word=seen), text, chosen)
    assert shown == encoded
    assert_same(conditioning, text_encode(taught("sd15"), encoded))


@pytest.mark.parametrize(("count", "word"), [(1, "sks"), (2, "cat dog")])
def test_quoted_with_apostrophes_the_word_is_not_found(count: int, word: str) -> None:
    """CLIP's tokenizer takes 's for a word of its own, so the clause is added."""
    conditioning, encoded = id_prompt(clip("sd15"), person("sd15", count), "a man called 'sks'")
    assert encoded == "a man called 'sks', person is sks"
    expected = text_encode(taught("sd15", count), f"a man called 'sks', person is {word}")
    assert_same(conditioning, expected)


# --- several embeddings to a word ---


def with_cat_and_dog(text: str) -> str:
    return text.replace("sks", "cat dog")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "sks",
        "a man is sks, smiling",
        "(sks:1.3) and sks in a (big (sks))",
        "sks sks",
        "desks and zxqsks and sks",
        "sks1 and _sks",
    ],
)
def test_two_embeddings_take_two_places(kind: str, text: str) -> None:
    conditioning, encoded = id_prompt(clip(kind), person(kind, 2), text)
    assert encoded == text
    spelled = " ".join(
        word if word in ("desks", "zxqsks") else with_cat_and_dog(word) for word in text.split(" ")
    )
    assert_same(conditioning, text_encode(taught(kind, 2), spelled))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("before", [72, 73, 74, 75])
def test_two_embeddings_at_the_end_of_a_row(kind: str, before: int) -> None:
    """All the text stays, and the second embedding comes after the first also where a new row begins between them."""
    text = f"{' '.join(['red'] * before)} sks and blue"
    conditioning, _ = id_prompt(clip(kind), person(kind, 2), text)
    assert states_of(conditioning).shape[0] == 154
    assert_same(conditioning, text_encode(taught(kind, 2), with_cat_and_dog(text)))


def test_two_embeddings_in_the_clause() -> None:
    conditioning, encoded = id_prompt(clip("sdxl"), person("sdxl", 2), "a red hat", "woman")
    assert encoded == "a red hat, woman is sks"
    assert_same(conditioning, text_encode(taught("sdxl", 2), "a red hat, woman is cat dog"))


def test_two_embeddings_share_a_token_weight() -> None:
    conditioning, _ = id_prompt(clip("sdxl"), person("sdxl", 2), "a (sks:2.0) here", token_weight=0.75)
    assert_same(conditioning, text_encode(taught("sdxl", 2), "a (cat dog:1.5) here"))


# --- embeddings of the user's ---


@pytest.fixture
def put_embedding(comfy: None) -> Iterator[Callable[[str], None]]:
    """Writes an embedding of two vectors where ComfyUI looks for them; gone after the test."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("embeddings")[0])
    made: list[Path] = []

    def put(name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.safetensors"
        save_file({f"clip_{e}": recipe.value(0, f"ti.{e}", (2, WIDTH)) for e in "lgh"}, path)
        made.append(path)

    yield put
    for path in made:
        path.unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "a photo of sks, embedding:mine at the sea",
        "embedding:mine sks",
        "a (embedding:mine:1.2) sks embedding:mine",
    ],
)
def test_an_embedding_beside_the_word(kind: str, text: str, put_embedding: Callable[[str], None]) -> None:
    put_embedding("mine")
    conditioning, encoded = id_prompt(clip(kind), person(kind), text)
    assert encoded == text
    assert_same(conditioning, text_encode(taught(kind), text))
    without, _ = id_prompt(clip(kind), person(kind), text.replace("embedding:mine", "red blue"))
    assert changed_positions(conditioning, without)


@pytest.mark.parametrize("count", [1, 2])
def test_an_embedding_of_the_identifiers_name_is_not_the_word(
    count: int, put_embedding: Callable[[str], None]
) -> None:
    put_embedding("sks")
    put_embedding("red-sks")
    text = "embedding:sks and (embedding:red-sks:1.1)"
    conditioning, encoded = id_prompt(clip("sd15"), person("sd15", count), text)
    assert encoded == f"{text}, person is sks"
    word = "sks" if count == 1 else "cat dog"
    assert_same(conditioning, text_encode(taught("sd15", count), f"{text}, person is {word}"))


def test_a_prompt_that_ends_in_an_embedding_gets_the_clause(put_embedding: Callable[[str], None]) -> None:
    put_embedding("mine")
    conditioning, encoded = id_prompt(clip("sdxl"), person("sdxl"), "a photo, embedding:mine")
    assert_same(conditioning, text_encode(taught("sdxl"), encoded))
    missing, _ = id_prompt(clip("sdxl"), person("sdxl"), "a photo, red blue")
    assert changed_positions(conditioning, missing)


# --- CLIPs ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_with_clip_skip(kind: str) -> None:
    from nodes import CLIPSetLastLayer

    skipped, expected = (
        CLIPSetLastLayer().set_last_layer(each, -3)[0] for each in (clip(kind), taught(kind))
    )
    conditioning, _ = id_prompt(skipped, person(kind), PLAIN_TEXT)
    assert_same(conditioning, text_encode(expected, PLAIN_TEXT))
    whole, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    assert changed_positions(conditioning, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_with_a_lora(kind: str) -> None:
    encoder = ENCODERS[kind][0]
    name = f"clip_{encoder}.transformer.text_model.encoder.layers.0.mlp.fc1.weight"

    def patched(some_clip: Any) -> Any:
        clone = some_clip.clone()
        weight = dict(some_clip.cond_stage_model.named_parameters())[name]
        assert clone.add_patches({name: ("diff", (0.2 * recipe.weight(5, name, weight.shape),))}, 1.0)
        return clone

    conditioning, _ = id_prompt(patched(tiny_clip(kind)), person(kind), PLAIN_TEXT)
    expected = text_encode(patched(teach(tiny_clip(kind), {SKS: 0}, person(kind))), PLAIN_TEXT)
    assert_same(conditioning, expected)
    without, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    assert changed_positions(conditioning, without)


@pytest.mark.parametrize(
    ("identity_kind", "clip_kind", "wanted", "found"),
    [
        ("sdxl", "sd15", "l 64, g 64", "l 64"),
        ("sd15", "sdxl", "l 64", "l 64, g 64"),
        ("sd21", "sd15", "h 64", "l 64"),
        ("sd15", "sd21", "l 64", "h 64"),
    ],
)
@pytest.mark.parametrize("text", ["a cat", "sks"])
def test_a_clip_of_another_model_is_refused(
    identity_kind: str, clip_kind: str, wanted: str, found: str, text: str
) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    with pytest.raises(MismatchError) as refused:
        id_prompt(clip(clip_kind), person(identity_kind), text)
    message = str(refused.value)
    assert (
        f"made for a model with text encoders of widths {wanted}, this CLIP is that of a model with"
        in message
    )
    assert f"of widths {found}." in message
    assert "Wire the CLIP of a checkpoint of the adapter's family" in message


def test_a_word_of_another_width_is_refused() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    wide = person("sd15", l=torch.ones(1, 1, 768))
    with pytest.raises(
        MismatchError, match="made for SD1.5, this CLIP is that of a model with text encoders of widths l 64"
    ):
        id_prompt(clip("sd15"), wide, "sks")


@pytest.mark.parametrize("text", ["a cat", "a photo of sks"])
def test_an_identity_without_a_word_is_warned_of(text: str, caplog: pytest.LogCaptureFixture) -> None:
    wordless = replace(person("sdxl"), text_tokens={})
    conditioning, encoded = id_prompt(clip("sdxl"), wordless, text)
    assert encoded == text
    assert_same(conditioning, text_encode(clip("sdxl"), text))
    assert "ID Prompt: the adapter of this identity has no text branch" in caplog.text


# --- nothing else changes ---


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_changes_neither_the_identity_nor_the_clip(kind: str) -> None:
    identity = person(kind, 2)
    before = {name: tensor.clone() for name, tensor in identity.text_tokens.items()}
    plain = text_encode(clip(kind), PLAIN_TEXT)
    first, _ = id_prompt(clip(kind), identity, "a (sks:1.3) here", token_weight=0.5)
    again, _ = id_prompt(clip(kind), identity, "a (sks:1.3) here", token_weight=0.5)
    assert_same(first, again)
    assert identity.text_tokens.keys() == before.keys()
    assert all(torch.equal(identity.text_tokens[name], tensor) for name, tensor in before.items())
    assert_same(text_encode(clip(kind), PLAIN_TEXT), plain)


def test_identities_in_half_precision_are_read_in_full() -> None:
    half = person("sd15", l=vectors("sd15")["l"].half())
    conditioning, _ = id_prompt(clip("sd15"), half, PLAIN_TEXT)
    expected, _ = id_prompt(clip("sd15"), person("sd15"), PLAIN_TEXT)
    torch.testing.assert_close(states_of(conditioning), states_of(expected), atol=2e-2, rtol=0)
