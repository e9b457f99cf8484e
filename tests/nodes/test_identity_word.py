"""ID Prompt with IDAdapter: the identity's embeddings in place of the identifier word, before the text encoder.

What is expected comes from ComfyUI alone: CLIP Text Encode with a CLIP whose embedding table holds the identity's vector as that
word.
"""

from __future__ import annotations

import pytest
import torch

from tests.nodes.word import (
    ENCODERS,
    KINDS,
    PLAIN_TEXT,
    POSITION,
    SKS,
    WIDTH,
    assert_same,
    cats,
    changed_positions,
    clip,
    id_prompt,
    person,
    states_of,
    table,
    taught,
    teach,
    text_encode,
    vectors,
)
from tests.tiny.checkpoints import tiny_clip
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features

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
