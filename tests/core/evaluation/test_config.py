"""What an evaluation is asked for: read strictly, refused by name before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from idadapter_core.config import config_toml, parse_config
from idadapter_core.errors import ConfigError
from idadapter_core.evaluation.config import EvaluationConfig, RunEntry, read_evaluation, require_sound
from idadapter_core.evaluation.metrics import METRICS, read_requirement
from idadapter_core.evaluation.presets import PRESETS, with_preset
from idadapter_core.evaluation.prompts import EXPRESSION, GROUPS, POSE, POSES, built_in, expression_name

CONFIGS = Path(__file__).parents[3] / "configs"
TOML = """
[data]
index = "index.parquet"
[[runs]]
name = "naive"
path = "a.safetensors"
scales = [0.5, 1]
[[runs]]
name = "rescaled"
path = "a.safetensors"
rescale = true
parts = "both"
[[prompts]]
text = "a <class word> as a knight"
group = "costume"
[metrics]
faces = "buffalo_l"
[preset.adapters]
"full" = "x"
"""


def read(folder: Path, text: str = TOML, *overrides: str) -> EvaluationConfig:
    path = folder / "eval.toml"
    path.write_text(text, encoding="utf-8")
    return read_evaluation(path, overrides)


def configured(**sections: Any) -> EvaluationConfig:
    base = {"data": {"index": "i"}, "metrics": {"faces": "f"}, "runs": [{"name": "one", "path": "p"}]}
    return parse_config(EvaluationConfig, {**base, **sections})


def test_tables_of_runs_and_prompts(tmp_path: Path) -> None:
    config = read(tmp_path, TOML, "data.references=2", "sampling.seeds=[1, 2]")
    assert config.runs[0] == RunEntry("naive", "a.safetensors", scales=(0.5, 1.0))
    assert config.runs[1].rescale
    assert (config.data.references, config.sampling.seeds) == (2, (1, 2))
    assert config.all_prompts()[-1].words("man") == "a man as a knight"
    require_sound(config)


def test_what_is_written_reads_back_as_it_was(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert read(tmp_path, config_toml(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("scales", "scale"), r"unknown setting runs\[0\]\.scale; did you mean scales\?"),
        (
            ('parts = "both"', 'parts = "word"'),
            "rescaled: parts must be one of both, adapter, text, got 'word'",
        ),
        (("[0.5, 1]", "[-1]"), "naive: scales must be a finite number of at least 0"),
        (("[0.5, 1]", "[]"), "naive: scales is empty"),
        (('path = "a.safetensors"\nscales', "scales"), r"each of \[\[runs\]\] needs a name and a path"),
        (("<class word> as", "knight as"), "has no <class word>"),
        (('group = "costume"', 'group = "pose"\nasks = "tilted"'), "must be one of front, side, left"),
        (('group = "costume"', 'group = "expression"'), "must say what it asks for"),
        (('faces = "buffalo_l"', 'faces = ""'), r"metrics\.faces is empty"),
        (("[metrics]", "[metrcs]"), r"unknown setting metrcs; did you mean metrics\?"),
        (("[metrics]", "[metrics]\nface = 1"), r"unknown setting metrics\.face; did you mean faces\?"),
        (("[[prompts]]", "[prompts]"), r"prompts must be a list, got \{"),
        (
            ("[metrics]", "[preset]\nscales = [1, 'x']\n[metrics]"),
            r"preset\.scales must be a number, got 'x'",
        ),
        (("[metrics]", "[sampling]\nsize = 500\n[metrics]"), r"sampling\.size must be a multiple of 8"),
        (("[metrics]", '[sampling]\ngroups = ["cloths"]\n[metrics]'), "did you mean clothes"),
        (("[metrics]", '[expression]\npath = "x"\n[metrics]'), r"expression\.classes must name"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in TOML
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, TOML.replace(*change, 1))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {}}, r"data\.index is empty"),
        ({"runs": [{"name": "a", "path": "p"}] * 2}, "'a' is twice among the names"),
        ({"runs": [{"name": "base model", "path": "p"}]}, "which is an anchor"),
        (
            {"runs": [{"name": "a", "path": "p", "references": 5}]},
            "is given 5 photos .* data.references is 4",
        ),
        ({"runs": [{"name": "a", "path": "p", "scales": [1, 1.0]}]}, "1.0 is twice among the scales of a"),
        ({"sampling": {"seeds": [3, 3]}}, "3 is twice among sampling.seeds"),
        ({"sampling": {"groups": []}}, "there are no prompts"),
        ({"prompts": [{"text": "a photo of a <class word>"}]}, "is twice among the prompts"),
        (
            {"expression": {"path": "x", "classes": ["Happy", "Sad", "Angry"]}},
            "asks for surprise, which expression.classes has not",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_sound(configured(**sections))


def test_the_built_in_prompts() -> None:
    prompts = built_in(GROUPS)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    for group in GROUPS:
        assert 3 <= sum(prompt.group == group for prompt in prompts) <= 4
    for prompt in prompts:
        assert "<class word>" in prompt.text
        assert "sks" not in prompt.text
        assert prompt.asks or prompt.group == "plain"
        assert prompt.group != POSE or prompt.asks in POSES
    # Every class asked for is in the label lists of published classifiers.
    affectnet = ["Anger", "Contempt", "Disgust", "Fear", "Happiness", "Neutral", "Sadness", "Surprise"]
    fer = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
    for classes in (affectnet, fer):
        known = {expression_name(name) for name in classes}
        assert {prompt.asks for prompt in prompts if prompt.group == EXPRESSION} <= known
        assert len(known) == len(classes)


def test_rows_of_table_2() -> None:
    adapters = {"full": "full.safetensors", "no_text": "t", "no_mff": "m", "no_id_loss": "l", "n5": "five"}
    config = with_preset(
        configured(
            preset={"name": "idadapter-table2", "adapters": adapters}, data={"index": "i", "references": 5}
        )
    )
    require_sound(config)
    assert {run.name for run in config.runs} == {*PRESETS["idadapter-table2"].published, "one"}
    by_name = {run.name: run for run in config.runs}
    assert [by_name[f"N={n}"].references for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert (by_name["N=4"].path, by_name["N=5"].path) == ("full.safetensors", "five")
    assert by_name["no ID loss (N=4)"].references == 4
    with pytest.raises(ConfigError, match="N=5 is given 5 photos"):
        require_sound(with_preset(configured(preset={"name": "idadapter-table2", "adapters": {"full": "x"}})))


def test_rows_of_the_ablation_of_uniid() -> None:
    preset = {
        "name": "uniid-ablation",
        "scales": [0.5, 1.5],
        "adapters": {"adapter": "a", "text_branch": "t"},
    }
    runs = with_preset(configured(preset=preset, runs=[])).runs
    assert [(run.parts, run.rescale) for run in runs] == [
        ("text", False),
        ("adapter", False),
        ("both", False),
        ("both", True),
    ]
    assert all(run.scales == (0.5, 1.5) and run.text_branch == "t" for run in runs)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"name": "table3"}, "there is no preset table3; known are idadapter-table2, uniid-ablation"),
        ({"name": "idadapter-table"}, "did you mean idadapter-table2"),
        ({"name": "uniid-ablation"}, r"preset\.adapters\.adapter is missing; .* text_branch: "),
        ({"name": "uniid-ablation", "adapters": {"full": "x"}}, r"preset\.adapters\.full = 'x' is no file"),
    ],
)
def test_presets_that_cannot_be(preset: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_preset(configured(preset=preset))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id_sim", "in quotes since a shell takes >"),
        ("id_sim>0.5", "in quotes"),
        ("id_sim>=x", "in quotes"),
        ("id_sim>=nan", "in quotes"),
        ("id_smi>=0.5", "there is no metric id_smi; did you mean id_sim"),
        ("two/id_sim>=0.5", "there is no run two; there are one"),
        ("clip_t>=0.2", "clip_t needs metrics.clip, which the configuration does not name"),
        ("id_sim_2>=0.2", "needs metrics.second"),
        ("expr_div>=0.2", "needs expression.path"),
    ],
)
def test_requirements_that_cannot_be_met_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_requirement(text, configured())


def test_every_metric_can_be_required() -> None:
    config = configured(
        metrics={"faces": "f", "second": "s", "clip": "c"},
        expression={"path": "e", "classes": ["anger", "happiness", "sadness", "surprise"]},
    )
    for metric in METRICS:
        assert read_requirement(f"one/{metric.name} <= 0.5", config).metric == metric.name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("eval_*.toml")), ids=lambda path: path.name)
def test_the_configurations_that_come_along(path: Path) -> None:
    config = read_evaluation(path)
    require_sound(with_preset(config))
    if config.preset.adapters and not config.preset.name:
        require_sound(with_preset(read_evaluation(path, ["preset.name=uniid-ablation"])))
