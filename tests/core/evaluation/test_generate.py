"""Pictures by the trainer's own pipeline, from files on disk, on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idadapter_core.adapter import save_adapter
from idadapter_core.cli import evaluate as command
from idadapter_core.config import config_toml, parse_config
from idadapter_core.data.index import read_index
from idadapter_core.errors import ConfigError
from idadapter_core.evaluation.config import EvaluationConfig, RunEntry
from idadapter_core.evaluation.generate import Drawing, PipelineGenerator, recipe_of
from idadapter_core.evaluation.people import Person, choose_people
from idadapter_core.evaluation.prompts import Prompt
from idadapter_core.stable_diffusion.base import load_base
from idadapter_core.stable_diffusion.pipeline import Pipeline
from tests.harness.shim import run_shim
from tests.tiny.idadapter import CONFIGS, tiny_idadapter
from tests.tiny.toy import Toy, write_toy
from tests.tiny.uniid import TINY_SD15, uniid_state, write_published

PROMPT = Prompt("plain", "a photo of a <class word>")
RUNS = ("word", "uniid", "text", "adapter", "rescaled")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    run_shim()
    toy = write_toy(tmp_path_factory.mktemp("toy"))
    save_adapter(tiny_idadapter(CONFIGS["sd15"]), toy.folder / "idadapter.safetensors")
    write_published(toy.folder, uniid_state(TINY_SD15))
    return toy


def configuration(toy: Toy, output: Path, **sections: Any) -> EvaluationConfig:
    uniid = {
        "path": str(toy.folder / "adapter_branch" / "pytorch_model.bin"),
        "text_branch": str(toy.folder / "text_branch" / "pytorch_model.bin"),
    }
    content = {
        "base": toy.content(output)["base"],
        "data": {"index": str(toy.index), "split": "all", "identities": 2, "references": 2},
        "runs": [
            {"name": "word", "path": str(toy.folder / "idadapter.safetensors")},
            {"name": "uniid", **uniid},
            {"name": "text", "parts": "text", **uniid},
            {"name": "adapter", "parts": "adapter", **uniid},
            {"name": "rescaled", "rescale": True, **uniid},
        ],
        "prompts": [{"text": PROMPT.text}],
        "sampling": {"groups": [], "size": 64, "steps": 2, "cfg": 3.0},
        "metrics": {"faces": str(toy.folder / "package")},
        "output": {"folder": str(output)},
    }
    return parse_config(EvaluationConfig, {**content, **sections})


@pytest.fixture(scope="module")
def config(toy: Toy) -> EvaluationConfig:
    return configuration(toy, toy.folder / "result")


@pytest.fixture(scope="module")
def generator(toy: Toy, config: EvaluationConfig) -> PipelineGenerator:
    return PipelineGenerator(config, read_index(toy.index))


@pytest.fixture(scope="module")
def people(toy: Toy, config: EvaluationConfig) -> tuple[Person, ...]:
    return choose_people(read_index(toy.index), config.data, lambda photo: True)


def entry(config: EvaluationConfig, name: str) -> RunEntry:
    return next(run for run in config.runs if run.name == name)


def test_the_base_model_is_as_it_was_before_and_after_adapters(
    config: EvaluationConfig, generator: PipelineGenerator, people: tuple[Person, ...]
) -> None:
    base = Drawing(None, 0.0, people[0], PROMPT, 3)
    first = generator.generate(base)
    assert first.shape == (64, 64, 3)
    text = PROMPT.words(people[0].class_word)
    alone = Pipeline(load_base(config.base)).generate(text, seed=3, steps=2, cfg=3.0, width=64, height=64)
    np.testing.assert_array_equal(first, np.rint(alone.movedim(0, -1).numpy() * 255))
    drawings = [Drawing(entry(config, name), 1.0, people[0], PROMPT, 3) for name in RUNS]
    pictures = [generator.generate(drawing) for drawing in drawings]
    for one, picture in enumerate(pictures):
        assert not np.array_equal(picture, first), RUNS[one]
        for other in pictures[:one]:
            assert not np.array_equal(picture, other), RUNS[one]
    np.testing.assert_array_equal(generator.generate(base), first)
    np.testing.assert_array_equal(generator.generate(drawings[0]), pictures[0])


@pytest.mark.parametrize("name", ["uniid", "text", "adapter", "rescaled"])
def test_at_scale_0_nothing_acts(
    name: str, config: EvaluationConfig, generator: PipelineGenerator, people: tuple[Person, ...]
) -> None:
    base = generator.generate(Drawing(None, 0.0, people[0], PROMPT, 3))
    picture = generator.generate(Drawing(entry(config, name), 0.0, people[0], PROMPT, 3))
    assert np.abs(picture.astype(int) - base).max() <= 1


@pytest.mark.parametrize("name", ["word", "uniid"])
def test_people_photos_and_scales_change_the_picture(
    name: str, config: EvaluationConfig, generator: PipelineGenerator, people: tuple[Person, ...]
) -> None:
    run = entry(config, name)
    drawing = Drawing(run, 1.0, people[0], PROMPT, 3)
    drawings = [
        drawing,
        replace(drawing, person=people[1]),
        replace(drawing, run=replace(run, references=1)),
        replace(drawing, scale=0.5),
        replace(drawing, seed=4),
    ]
    pictures = [generator.generate(each).tobytes() for each in drawings]
    assert len(set(pictures)) == len(drawings)
    assert len({json.dumps(generator.recipe(each)) for each in drawings}) == len(drawings)


def test_the_recipe_names_all_that_takes_part(
    config: EvaluationConfig, generator: PipelineGenerator, people: tuple[Person, ...]
) -> None:
    drawing = Drawing(entry(config, "word"), 1.0, people[0], PROMPT, 3)
    found = generator.recipe(drawing)
    assert all(found["models"][name] for name in ("base", "adapter", "recognizer", "vision"))
    assert found["references"] == [photo.row.sha256 for photo in people[0].references]
    base = generator.recipe(replace(drawing, run=None))
    assert set(base["models"]) == {"base"}
    changed = [
        replace(config.sampling, **change)
        for change in (
            {"steps": 3},
            {"cfg": 4.0},
            {"size": 128},
            {"negative": "grey"},
            {"precision": "bf16"},
        )
    ]
    recipes = {json.dumps(recipe_of(drawing, s, {})) for s in (config.sampling, *changed)}
    assert len(recipes) == 1 + len(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_branch": "", "parts": "text"}, "only the text part is to act, but .* has none"),
        (
            {"path": "idadapter", "text_branch": "", "rescale": True},
            "normalized rescaling is for attention beside the text's",
        ),
    ],
)
def test_what_an_adapter_has_not_is_refused(
    change: dict[str, Any], message: str, toy: Toy, config: EvaluationConfig
) -> None:
    if "path" in change:
        change = {**change, "path": entry(config, "word").path}
    bad = replace(config, runs=(replace(entry(config, "uniid"), **change),))
    with pytest.raises(ConfigError, match=message):
        PipelineGenerator(bad, read_index(toy.index))


def test_the_command_with_real_models(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(toy, tmp_path / "result")
    config = replace(config, runs=config.runs[:2], data=replace(config.data, identities=1))
    (tmp_path / "eval.toml").write_text(config_toml(config), encoding="utf-8")
    arguments = ["--config", str(tmp_path / "eval.toml"), "--require", "id_sim_miss0>=0.1"]
    # Random weights draw no faces: every picture is a miss, and the requirement is not met.
    assert command.main(arguments) == 1
    first = capsys.readouterr()
    assert "4 pictures measured, 3 of them generated now" in first.out
    assert "word, scale 1: IDAdapter ID-Sim n/a, 1 misses" in first.out
    assert "required id_sim_miss0>=0.1: word, scale 1 has id_sim_miss0 0\n" in first.err
    assert command.main(arguments) == 1
    assert "4 pictures measured, 0 of them generated now" in capsys.readouterr().out
