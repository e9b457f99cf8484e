"""The configuration of an evaluation: TOML into dataclasses that check themselves, as for training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Settings, at_least, naming, one_of, parse_config, read_toml, writable
from ..errors import ConfigError
from ..prompts import CLASS_WORD
from ..stable_diffusion.config import PRECISIONS, BaseConfig, require_paths
from .prompts import EXPRESSION, GROUPS, POSE, POSES, Prompt, built_in, expression_name

BASE_MODEL, PASTE = "base model", "paste the reference"  # the anchors, which every evaluation has
SPLITS = ("train", "test", "all")
PARTS = ("both", "adapter", "text")  # of an adapter


@dataclass(frozen=True)
class PeopleConfig(Settings):
    """Who is drawn."""

    index: str = ""  # written by `python -m idadapter_core scan`
    split: str = "test"
    identities: int = 50  # people, drawn by the seed; 0: all that have enough photos
    references: int = 4  # photos of each: what adapters are given, and what pictures are compared with
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("data.split", self.split, SPLITS)
        at_least("data.identities", self.identities, 0)
        at_least("data.references", self.references, 1)


@dataclass(frozen=True)
class RunEntry(Settings):
    """An adapter, how it is used, and at which scales: a row of the result for each scale."""

    name: str = ""
    path: str = ""
    text_branch: str = ""  # UniID's second file; empty: none, or in the same file
    scales: tuple[float, ...] = (1.0,)  # of the parts that act; IDAdapter's word is there at any scale
    parts: str = "both"  # which act: both, adapter or text
    rescale: bool = False  # UniID's normalized rescaling, with its published schedule
    references: int = 0  # photos of the person that it is given; 0: data.references
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
    """A prompt of the user's own."""

    text: str = ""  # with <class word>
    group: str = "own"
    asks: str = ""  # in the group expression a class, in the group pose one of POSES; else a note

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
    """What is drawn, and how."""

    groups: tuple[str, ...] = GROUPS  # built-in prompts
    seeds: tuple[int, ...] = (0,)
    steps: int = 30
    cfg: float = 7.5
    size: int = 512  # side of the square pictures, pixels
    negative: str = ""
    precision: str = "no"  # bf16: the base in bfloat16

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
    """The models that judge. What has no model is n/a in all results."""

    faces: str = ""  # folder of an insightface package: detector and first recogniser
    second: str = (
        ""  # second recogniser, one that training never saw: another package's folder, or a torch IResNet
    )
    clip: str = ""  # folder of a transformers CLIPModel with its tokenizer, for CLIP-T and CLIP-I


@dataclass(frozen=True)
class ExpressionConfig(Settings):
    """A classifier of facial expressions as an ONNX file of the user's; input (1, 3 or 1, size, size), output one score a class."""

    path: str = ""
    size: int = 224  # side of its input, pixels
    classes: tuple[str, ...] = ()  # in the order of its scores
    mean: tuple[float, ...] = (
        0.485,
        0.456,
        0.406,
    )  # of values in 0..1; one number for grey, three for colour
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
    """Rows of a paper's ablation (`presets.PRESETS`), before those of [[runs]]."""

    name: str = ""
    scales: tuple[float, ...] = (1.0,)
    adapters: Mapping[str, Any] = field(default_factory=dict)  # files, under the names the preset asks for


@dataclass(frozen=True)
class EvaluationOutput(Settings):
    """Where it goes."""

    folder: str = "evaluation"


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """A whole evaluation."""

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
        """The built-in prompts that were chosen, then the user's own."""
        own = [Prompt(entry.group, entry.text, entry.asks) for entry in self.prompts]
        return (*built_in(self.sampling.groups), *own)


def read_evaluation(path: Path, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """The configuration in a TOML file, with `section.key=value` overrides on top (see `config.read_toml`).

    Raises:
        ConfigError: no such file, broken TOML, an unknown key, a value of another type or outside its range.
    """
    with naming(path, overrides):
        return parse_config(EvaluationConfig, read_toml(path, overrides))


def require_files(config: EvaluationConfig) -> None:
    """Raise ConfigError where a file that is named is not there, or the results cannot be written: before models are loaded."""
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
    # The base's face package is for a detector in L_id; pictures are judged with that of metrics.faces.
    require_paths(config.base, ["face_package"], named)
    writable("output.folder", config.output.folder)


def require_sound(config: EvaluationConfig) -> None:
    """Raise ConfigError where sections that are each fine do not fit together."""
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
