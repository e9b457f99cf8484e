"""ID Prompt with IDAdapter: words of several embeddings, and embeddings of the user's beside the word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.golden import recipe
from tests.nodes.word import (
    KINDS,
    WIDTH,
    assert_same,
    changed_positions,
    clip,
    id_prompt,
    person,
    states_of,
    taught,
    text_encode,
)

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
