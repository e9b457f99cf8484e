"""The base model in its own form: words, training, drawing, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from idadapter_core.demo_world import FACTORS, Factors, Person, caption
from idadapter_core.demo_world.base import LATENT_CHANNELS
from idadapter_core.demo_world.build.batches import face_weights
from idadapter_core.demo_world.build.settings import TrainingSchedule
from idadapter_core.demo_world.build.train_base import (
    prompts_to_judge,
    varied_rows,
)
from idadapter_core.demo_world.build.train_latent_reader import (
    accuracy,
    load_latent_reader,
    save_latent_reader,
    train_latent_reader,
)
from idadapter_core.demo_world.build.train_text import CaptionReader, random_captions
from idadapter_core.demo_world.captions import vocabulary, words_of
from idadapter_core.demo_world.readers import READ_FACTORS
from idadapter_core.demo_world.words import BEGIN, END, Words, words

SMALL = Words({"a": (320,), "woolen": (9, 5), ",": (267,)})


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


def test_words_have_rows_in_a_small_table() -> None:
    assert SMALL.known == (BEGIN, END, 5, 9, 267, 320)
    assert SMALL.unknown == 6
    assert SMALL.rows("A woolen, a")[:8] == [0, 5, 3, 2, 4, 5, 1, 1]
    assert SMALL.rows("")[:2] == [0, 1]
    assert SMALL.rows("a zebra a")[:5] == [0, 5, 6, 5, 1]
    assert SMALL.rows("a a", unknown_before=(1,))[:5] == [0, 5, 6, 5, 1]


def test_long_texts_are_cut_and_still_end() -> None:
    rows = SMALL.rows("a " * 100)
    assert len(rows) == 77
    assert rows[0] == 0
    assert rows[75:] == [5, 1]


def test_every_word_of_captions_is_known() -> None:
    assert set(vocabulary()) <= set(words().tokens)
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(Person.sample(0), Factors.sample(rng), word="sks")
        assert words().unknown not in words().rows(text)


def test_captions_of_a_picture_vary_while_training() -> None:
    person, factors = Person.sample(0), Factors.sample(np.random.default_rng(1))
    rng = np.random.default_rng(2)
    variants = [varied_rows(person, factors, rng) for _ in range(200)]
    drawn = [tuple(rows) for rows, _ in variants]
    silent = tuple(words().rows(""))
    strange = [row for row in drawn if words().unknown in row]
    assert 5 <= drawn.count(silent) <= 45
    assert 3 <= len(strange) <= 40
    assert len(set(drawn)) > 100
    again = np.random.default_rng(2)
    assert variants == [varied_rows(person, factors, again) for _ in range(200)]
    assert all(named == () for rows, named in variants if tuple(rows) == silent)
    with_expression = [named for _, named in variants if "expression" in named]
    assert 0.65 < len(with_expression) / len(variants) < 0.95


def test_prompts_to_judge_say_what_they_are_judged_by() -> None:
    prompts, truth = prompts_to_judge(30, 0)
    assert list(truth) == list(READ_FACTORS)
    for number, prompt in enumerate(prompts):
        assert truth["sex"][number] in prompt.split() or f"{truth['sex'][number]}," in prompt.split()
        for factor, values in truth.items():
            assert values[number] in READ_FACTORS[factor]
    assert set(FACTORS) <= set(truth)
    assert prompts_to_judge(3, 0)[0] == prompts[:3]
    assert prompts_to_judge(3, 1)[0] != prompts[:3]


def test_base_model_draws_the_same_from_its_file(tmp_path: Path) -> None:
    from idadapter_core.demo_world.base import BaseModel, load_base, save_base

    base = BaseModel().eval().requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(parameter.half().float())
    save_base(base, tmp_path / "base.safetensors")
    loaded = load_base(tmp_path / "base.safetensors")
    prompts = ["a photo of a man", "a sketch of a woman smiling"]
    latents = base.draw(prompts, seed=3, steps=2)
    assert latents.shape == (2, LATENT_CHANNELS, 16, 16)
    assert torch.equal(loaded.draw(prompts, seed=3, steps=2), latents)
    assert not torch.equal(base.draw(prompts, seed=4, steps=2), latents)
    assert not torch.equal(base.draw(prompts[::-1], seed=3, steps=2), latents)


def test_the_error_counts_more_in_the_box_of_the_head() -> None:
    weights = face_weights(np.array([[8, 16, 24, 32], [0, 0, 64, 64]], np.float32), 8, 8)
    assert weights.shape == (2, 8, 8)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(2))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:4, 1:3] = True  # rows, then columns, of 8 pixels each
    first = weights[0]
    assert (first[inside] / first[~inside].mean()).tolist() == pytest.approx([3.0] * 4)
    assert torch.equal(weights[1], torch.ones(8, 8))


def test_the_error_counts_most_near_eyes_and_mouth() -> None:
    boxes = np.array([[0, 0, 64, 64]], np.float32)
    points = np.array([[[24, 28], [40, 28], [32, 32], [26, 40], [38, 40]]], np.float32)  # margin of 6.4
    (weights,) = face_weights(boxes, 8, 8, points)
    assert weights.mean().item() == pytest.approx(1)
    most = weights == weights.max()
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[3:6, 2:6] = True
    assert torch.equal(most, expected)
    assert (weights[3, 3] / weights[0, 0]).item() == pytest.approx(8 / 3)


def test_a_latent_reader_learns_what_cells_show(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 64)
    latents = rng.standard_normal((64, LATENT_CHANNELS, 16, 16)).astype(np.float16)
    latents[np.arange(64), labels, 6:10, 6:10] += 4  # a class, a channel
    reader = train_latent_reader(
        latents, labels, TrainingSchedule(60, 32, 2e-3), tmp_path / "reader.pt", seed=0, log=lambda _: None
    )
    save_latent_reader(reader, tmp_path / "reader.safetensors")
    loaded = load_latent_reader(tmp_path / "reader.safetensors")
    assert accuracy(loaded, torch.from_numpy(latents).float(), labels) > 0.9
    wrong = torch.from_numpy(latents).float().roll(1, 1)
    assert accuracy(loaded, wrong, labels) < 0.3


def test_captions_name_what_the_text_encoder_is_asked_for() -> None:
    rows, named = random_captions(np.random.default_rng(0), 40)
    assert rows.shape == (40, 77)
    phrases = {
        name: [
            {tuple(words().rows(text)[1 : 1 + len(text.split())]) for text in words_of(name, value)}
            for value in values
        ]
        for name, values in READ_FACTORS.items()
        if name in ("expression", "background")
    }
    for name, classes in phrases.items():
        for row, value in zip(rows.tolist(), named[name].tolist(), strict=True):
            found = {
                number
                for number, texts in enumerate(classes)
                for text in texts
                if any(tuple(row[start : start + len(text)]) == text for start in range(77))
            }
            assert (value in found) if value >= 0 else not found


def test_padding_does_not_change_what_a_caption_says() -> None:
    reader = CaptionReader().eval()
    rows, _ = random_captions(np.random.default_rng(1), 3)
    together = reader(rows)
    for number in range(3):
        alone = reader(rows[number : number + 1])
        for name, scores in together.items():
            torch.testing.assert_close(scores[number], alone[name][0], atol=1e-5, rtol=1e-4)
