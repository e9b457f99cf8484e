"""Evaluation configuration, read from TOML into dataclasses that validate themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Settings, at_least, naming, one_of, parse_config, read_toml, writable
from ..errors import ConfigError
from ..placeholders import CLASS_WORD
from ..stable_diffusion.config import PRECISIONS, BaseConfig, require_paths
from .prompts import EXPRESSION, GROUPS, POSE, POSES, Prompt, built_in, expression_name

BASE_MODEL, PASTE = "base model", "paste the reference"  # anchors, part of every evaluation
SPLITS = ("train", "test", "all")
PARTS = ("both", "adapter", "text")  # of an adapter


@dataclass(frozen=True)
class PeopleConfig(Settings):
    """The people to generate (`[data]`)."""

    index: str = ""  # index file, written by `python -m idadapter_core scan`
    split: str = "test"
    identities: int = 50  # number of people, chosen at random by the seed; 0: all who have enough photos
    references: int = 4  # photos per person: input of the adapters and reference of the metrics
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("data.split", self.split, SPLITS)
        at_least("data.identities", self.identities, 0)
        at_least("data.references", self.references, 1)


@dataclass(frozen=True)
class RunEntry(Settings):
    """An adapter and its settings (`[[runs]]`). Each scale is one row of the result."""

    name: str = ""
    path: str = ""
    text_branch: str = ""  # UniID's second file; empty: none, or both branches are in one file
    # Strengths of the active parts. IDAdapter's identity word is present at every scale.
    scales: tuple[float, ...] = (1.0,)
    parts: str = "both"  # active parts: both, adapter or text
    rescale: bool = False  # UniID's normalized rescaling, with its published schedule
    references: int = 0  # reference photos per person for this adapter; 0: data.references
    log: str = ""  # folder of the training run, for gates and norm ratios in the report

    def __post_init__(self) -> None:
        if not self.name or not self.path:
            raise ConfigError(
                f"each of [[runs]] needs a name and a path, got name {self.name!r}, path {self.path!r}"
            )
        if not self.scales:
            raise ConfigError(f"{self.name}: scales is empty; give at least one number, for example [1.0]")
        for scale in self.scales:
            at_least(f"{self.name}: scales", scale, 0)
        one_of(f"{self.name}: parts", self.parts, PARTS)
        at_least(f"{self.name}: references", self.references, 0)


@dataclass(frozen=True)
class PromptEntry(Settings):
    """A user's prompt (`[[prompts]]`)."""

    text: str = ""  # prompt, with <class word>
    group: str = "own"
    # Expected result. Group expression: a class of the classifier; group pose: one of POSES; other groups: a free note.
    asks: str = ""

    def __post_init__(self) -> None:
        if CLASS_WORD not in self.text:
            raise ConfigError(
                f"the prompt {self.text!r} has no {CLASS_WORD}, so it draws nobody; write it where the person's noun belongs"
            )
        if self.group == POSE:
            one_of(f"asks of the prompt {self.text!r}", self.asks, POSES)
        if self.group == EXPRESSION and not self.asks:
            raise ConfigError(f"the prompt {self.text!r} of the group expression must say what it asks for")


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """Prompts and sampler settings (`[sampling]`)."""

    groups: tuple[str, ...] = GROUPS  # groups of built-in prompts
    seeds: tuple[int, ...] = (0,)
    steps: int = 30
    cfg: float = 7.5
    size: int = 512  # side of the square images, pixels
    negative: str = ""
    precision: str = "no"  # no: fp32; bf16: the base model in bfloat16

    def __post_init__(self) -> None:
        for group in self.groups:
            one_of("sampling.groups", group, GROUPS)
        if not self.seeds:
            raise ConfigError("sampling.seeds is empty; give at least one number")
        for seed in self.seeds:
            at_least("sampling.seeds", seed, 0)
        at_least("sampling.steps", self.steps, 1)
        at_least("sampling.cfg", self.cfg, 0)
        at_least("sampling.size", self.size, 64)
        if self.size % 8:
            raise ConfigError(
                f"sampling.size must be a multiple of 8 (a latent is 8 pixels), got {self.size}"
            )
        one_of("sampling.precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class MetricsConfig(Settings):
    """The models of the metrics (`[metrics]`). A metric without a model is n/a in all results."""

    faces: str = ""  # folder of an insightface package: detector and first recogniser
    # Second recogniser, not used in training: another package's folder, or a torch IResNet file.
    second: str = ""
    clip: str = ""  # folder of a transformers CLIPModel with its tokenizer, for CLIP-T and CLIP-I


@dataclass(frozen=True)
class ExpressionConfig(Settings):
    """A user's ONNX classifier of facial expressions: input (1, 3 or 1, size, size), output one score per class."""

    path: str = ""
    size: int = 224  # side of the input, pixels
    classes: tuple[str, ...] = ()  # class names, in the order of the scores
    # Normalisation of values in 0..1: one number for grey, three for colour.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.path and len(self.classes) < 2:
            raise ConfigError("expression.classes must name the model's classes in the order of its scores")
        at_least("expression.size", self.size, 16)
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, 3):
                raise ConfigError(
                    f"expression.{name} must have 1 or 3 numbers, got {list(getattr(self, name))}"
                )
        if not all(value > 0 for value in self.std):
            raise ConfigError(f"expression.std must be above 0, got {list(self.std)}")


@dataclass(frozen=True)
class PresetConfig(Settings):
    """The rows of a paper's ablation (`presets.PRESETS`), placed before those of [[runs]]."""

    name: str = ""
    scales: tuple[float, ...] = (1.0,)
    # Adapter files, by the names that the preset requires.
    adapters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationOutput(Settings):
    """The result folder (`[output]`)."""

    folder: str = "evaluation"


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """All settings of an evaluation."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: PeopleConfig = field(default_factory=PeopleConfig)
    runs: tuple[RunEntry, ...] = ()
    prompts: tuple[PromptEntry, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    expression: ExpressionConfig = field(default_factory=ExpressionConfig)
    preset: PresetConfig = field(default_factory=PresetConfig)
    output: EvaluationOutput = field(default_factory=EvaluationOutput)

    def __post_init__(self) -> None:
        if not self.metrics.faces:
            raise ConfigError(
                "metrics.faces is empty; name the folder of an insightface package (buffalo_l, antelopev2)"
            )

    def all_prompts(self) -> tuple[Prompt, ...]:
        """The chosen built-in prompts, then the user's."""
        own = [Prompt(entry.group, entry.text, entry.asks) for entry in self.prompts]
        return (*built_in(self.sampling.groups), *own)


def read_evaluation(path: Path, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """Read a configuration from a TOML file, with `section.key=value` overrides applied last (see `config.read_toml`).

    Raises:
        ConfigError: no such file, broken TOML, an unknown key, a value of the wrong type or out of range.
    """
    with naming(path, overrides):
        return parse_config(EvaluationConfig, read_toml(path, overrides))


def require_files(config: EvaluationConfig) -> None:
    """Raise ConfigError if a named file is missing or the results cannot be written. Called before models are loaded."""
    named = {
        "data.index": config.data.index,
        "metrics.faces": config.metrics.faces,
        "metrics.second": config.metrics.second,
        "metrics.clip": config.metrics.clip,
        "expression.path": config.expression.path,
    }
    for run in config.runs:
        named |= {f"path of {run.name}": run.path, f"text_branch of {run.name}": run.text_branch}
        named |= {f"log of {run.name}": run.log}
    # The base's face package serves a detector in L_id only; the metrics use metrics.faces.
    require_paths(config.base, ["face_package"], named)
    writable("output.folder", config.output.folder)


def require_sound(config: EvaluationConfig) -> None:
    """Raise ConfigError if sections contradict each other."""
    if not config.data.index:
        raise ConfigError("data.index is empty; name the index that `python -m idadapter_core scan` wrote")
    prompts = config.all_prompts()
    if not prompts:
        raise ConfigError("there are no prompts; choose sampling.groups, or add [[prompts]]")
    names = [run.name for run in config.runs]
    lists: dict[str, Sequence[object]] = {
        "the names of [[runs]]": names,
        "the prompts": [prompt.text for prompt in prompts],
        "sampling.seeds": config.sampling.seeds,
        **{f"the scales of {run.name}": run.scales for run in config.runs},
    }
    for what, entries in lists.items():
        if twice := [entry for entry, count in Counter(entries).items() if count > 1]:
            raise ConfigError(
                f"{twice[0]!r} is twice among {what}; rows of the result could not be told apart"
            )
    if taken := {BASE_MODEL, PASTE} & set(names):
        raise ConfigError(f"a run cannot be called {taken.pop()!r}, which is an anchor; choose another name")
    for run in config.runs:
        if run.references > config.data.references:
            raise ConfigError(
                f"{run.name} is given {run.references} photos of a person, but data.references is {config.data.references}; raise that"
            )
    if config.expression.path:
        known = {expression_name(name) for name in config.expression.classes}
        for prompt in prompts:
            if prompt.group == EXPRESSION and expression_name(prompt.asks) not in known:
                raise ConfigError(
                    f"the prompt {prompt.text!r} asks for {prompt.asks}, which expression.classes has not "
                    f"({', '.join(config.expression.classes)}); leave it out, or use another model"
                )
