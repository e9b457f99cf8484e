"""Training configuration, read from TOML into dataclasses that validate themselves.

Every key has a default. An unknown key is an error that suggests the nearest known one. Settings marked `MayChange` may differ when a
run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ..config import (
    Changeable,
    MayChange,
    Settings,
    at_least,
    literal,
    naming,
    nearest,
    one_of,
    parse_config,
    read_toml,
    with_new_names,
    within,
)
from ..errors import ConfigError
from ..methods import METHODS, Method
from ..methods.method import Needs, Recipe
from ..placeholders import CAPTION, CLASS_WORD, require_known
from ..stable_diffusion.config import PRECISIONS, BaseConfig

ALIGNMENTS = ("target", "detector")
GATES = ("noise", "detector")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class DataConfig(Settings):
    """The training data (`[data]`)."""

    index: MayChange[str] = ""  # index file, written by `python -m idadapter_core scan`
    # Folder of cached latents, crops and features; empty: compute them during training.
    cache: MayChange[str] = ""
    resolution: int = 512  # side of the square training images, pixels
    # Reference photos per sample (N). IDAdapter only: UniID is shown one photo (`other_photo`).
    references: int = 4
    # UniID and IP-Adapter: share of samples whose person is known by another of their photos, not by the target itself as in the papers.
    # An adapter that never sees another photo also learns to copy the target's background and light.
    other_photo: float = 0.0
    # IDAdapter: share of samples with the target itself among the references. An adapter that always sees it copies its expression and pose.
    own_photo: float = 0.0
    min_photos: int = 1  # skip people with fewer usable photos
    # Prompt of every sample; <caption> and <class word> are replaced. Empty: the method's own.
    prompt: str = ""
    flip: bool = True  # mirror half of the targets
    # Cache the outputs of CLIP vision and of the face network's stages, not only the crops.
    cache_features: bool = True
    # Largest allowed share of unusable photos in the index (0..1). Above it, the run stops.
    max_bad_share: MayChange[float] = 0.05
    workers: MayChange[int] = 2  # loader workers per process; 0: load in the process itself

    def __post_init__(self) -> None:
        at_least("data.resolution", self.resolution, 8)
        if self.resolution % 8:
            raise ConfigError(
                f"data.resolution must be a multiple of 8 (a latent is 8 pixels), got {self.resolution}"
            )
        at_least("data.references", self.references, 1)
        within("data.other_photo", self.other_photo, 0, 1)
        within("data.own_photo", self.own_photo, 0, 1)
        at_least("data.min_photos", self.min_photos, 1)
        at_least("data.workers", self.workers, 0)
        within("data.max_bad_share", self.max_bad_share, 0, 1)
        require_known("data.prompt", self.prompt, (CLASS_WORD, CAPTION))


@dataclass(frozen=True)
class AdapterSection(Settings):
    """The adapter to train (`[adapter]`)."""

    method: str = "idadapter"
    # Adapter file to continue from; empty: a new adapter with the preset of the base's family.
    start: MayChange[str] = ""
    branch: str = "adapter"  # branch to train, for methods that train one branch per run (UniID)
    # Overrides of the preset of the method's config.
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trained = {name: method.recipe for name, method in METHODS.items() if method.recipe is not None}
        one_of("adapter.method", self.method, tuple(trained))
        branches = {branch for recipe in trained.values() for branch in recipe.branches}
        one_of("adapter.branch", self.branch, tuple(trained[self.method].branches or sorted(branches)))
        known = {entry.name for entry in dataclasses.fields(METHODS[self.method].config)}
        for name in self.settings:
            if name not in known:
                raise ConfigError(
                    f"adapter.settings.{name} is no setting of {self.method}{nearest(name, known)}"
                )


@dataclass(frozen=True)
class LossConfig(Settings):
    """The loss (`[loss]`): L = L_SD + F(x0_hat) * lambda * L_id (IDAdapter, Eq. 8 and 9)."""

    identity: float = 0.1  # lambda; 0 disables L_id
    # Position of the face in x0_hat. target: same as in the target image; detector: found by a face detector (as in the paper).
    align: str = "target"
    # F. noise: 1 where alpha-bar is at least gate_alpha; detector: 1 where a detector finds a face (as in the paper).
    gate: str = "noise"
    gate_alpha: float = 0.5  # smallest alpha-bar at which L_id counts (0..1), with gate = "noise"
    snr_gamma: float = 0.0  # gamma of min-SNR weighting; 0: off, as in both papers
    face_weight: float = 1.0  # weight of L_SD in the face, against 1 elsewhere; 1: off, as in both papers
    # L_id's decoder and recogniser. no: fp32; bf16: autocast, twice as fast on a CPU and a little less exact.
    mixed_precision: str = "no"
    # Steps in which the adapter itself denoises the latents of L_id, without gradient; 0: off, the noise is added to the target, as in
    # IDAdapter. They begin and end at timesteps drawn from these bounds.
    denoise_steps: int = 0
    denoise_from: tuple[int, int] = (750, 900)
    denoise_to: tuple[int, int] = (30, 400)
    renamed: ClassVar = {"min_snr": "snr_gamma"}

    def __post_init__(self) -> None:
        one_of("loss.align", self.align, ALIGNMENTS)
        one_of("loss.gate", self.gate, GATES)
        one_of("loss.mixed_precision", self.mixed_precision, PRECISIONS)
        at_least("loss.identity", self.identity, 0)
        within("loss.gate_alpha", self.gate_alpha, 0, 1)
        at_least("loss.snr_gamma", self.snr_gamma, 0)
        at_least("loss.face_weight", self.face_weight, 1)
        at_least("loss.denoise_steps", self.denoise_steps, 0)
        bounds = (*self.denoise_to, *self.denoise_from)
        if list(bounds) != sorted(bounds) or not 0 <= bounds[0] <= bounds[-1] < 1000:
            raise ConfigError(
                "loss.denoise_to and loss.denoise_from must be ascending timesteps of 0..999, and the first must not reach beyond the second; "
                f"they are {list(self.denoise_to)} and {list(self.denoise_from)}"
            )


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Optimisation (`[train]`)."""

    # May change on resume only with a constant learning rate: other schedules depend on the last step.
    steps: Annotated[int, Changeable(lambda train: train.lr_scheduler == "constant")] = 50_000
    global_batch_size: int = 4  # samples per step, over all processes and micro-batches
    gradient_accumulation_steps: MayChange[int] = 1  # micro-batches per step
    learning_rate: float = 3e-5
    # Of the adapter's encoder; 0: learning_rate. Lower, for an encoder that knows people already and layers in the UNet that are new.
    encoder_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    lr_scheduler: str = "constant"  # constant or cosine
    lr_warmup_steps: int = 0  # steps of linear warm-up
    max_grad_norm: float = 0.0  # gradient clipping; 0: off
    ema_decay: float = 0.0  # decay of the weights' moving average; 0: off
    drop_identity: float = 0.05  # share of samples without the identity
    drop_text: float = 0.05  # share of samples without the rest of the prompt
    drop_both: float = 0.05  # share of samples with neither, as in a negative prompt
    mixed_precision: str = "no"  # no: fp32; bf16: autocast, with fp32 master weights
    # Recompute the UNet's blocks in the backward pass: less memory, more time.
    gradient_checkpointing: MayChange[bool] = False
    seed: int = 0
    renamed: ClassVar = {
        "batch": "global_batch_size",
        "accumulate": "gradient_accumulation_steps",
        "lr": "learning_rate",
        "schedule": "lr_scheduler",
        "warmup": "lr_warmup_steps",
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "precision": "mixed_precision",
        "checkpointing": "gradient_checkpointing",
    }

    def __post_init__(self) -> None:
        one_of("train.lr_scheduler", self.lr_scheduler, SCHEDULES)
        if self.mixed_precision == "fp16":
            raise ConfigError(
                "train.mixed_precision: fp16 is not offered, since gradients vanish in it unless the loss is scaled; bf16 takes as little memory "
                "and needs no scaling"
            )
        one_of("train.mixed_precision", self.mixed_precision, PRECISIONS)
        for name in ("steps", "global_batch_size", "gradient_accumulation_steps"):
            at_least(f"train.{name}", getattr(self, name), 1)
        if not self.learning_rate > 0:
            raise ConfigError(f"train.learning_rate must be above 0, got {self.learning_rate}")
        for name in ("encoder_learning_rate", "weight_decay", "lr_warmup_steps", "max_grad_norm"):
            at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("ema_decay", "drop_identity", "drop_text", "drop_both"):
            within(f"train.{name}", getattr(self, name), 0, 1)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"train.betas must be at least 0 and below 1, got {self.betas}")
        dropped = self.drop_identity + self.drop_text + self.drop_both
        if dropped > 1:
            raise ConfigError(
                f"train.drop_identity, drop_text and drop_both must not add up to more than 1, they are {dropped:g}"
            )


@dataclass(frozen=True)
class OutputConfig(Settings):
    """The run folder, checkpoints, logs, validation and sample grids (`[output]`)."""

    folder: str = "runs/adapter"
    save_every: int = 1000  # steps between checkpoints
    keep_last: int = 3  # number of newest checkpoints to keep
    keep_every: int = 10_000  # also keep the checkpoints at multiples of this step; 0: none
    log_every: int = 10  # steps between log entries
    validate_every: int = 0  # steps between validation losses on test people; 0: never
    validate_samples: int = 64  # samples per validation
    sample_every: int = 0  # steps between sample grids; 0: never
    sample_steps: int = 20  # sampler steps in a grid
    sample_cfg: float = 5.0  # CFG scale in a grid
    sample_people: int = 2  # test people per grid
    # Prompts of a grid; <class word> is replaced.
    prompts: tuple[str, ...] = ("a photo of a <class word>", "a painting of a <class word> in a garden")
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in (
            "save_every",
            "keep_last",
            "log_every",
            "validate_samples",
            "sample_steps",
            "sample_people",
        ):
            at_least(f"output.{name}", getattr(self, name), 1)
        for name in ("keep_every", "validate_every", "sample_every", "sample_cfg"):
            at_least(f"output.{name}", getattr(self, name), 0)
        for prompt in self.prompts:
            require_known("output.prompts", prompt, (CLASS_WORD,))


@dataclass(frozen=True)
class RunConfig(Settings):
    """All settings of a training run."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: MayChange[OutputConfig] = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        title, by_target = self.method.title, self.recipe.known_by_target
        if self.data.own_photo and by_target:
            raise ConfigError(
                f"data.own_photo has no effect on {title}, which is shown one photo; leave it out, or set data.other_photo"
            )
        if self.data.other_photo and not by_target:
            raise ConfigError(
                f"data.other_photo has no effect on {title}, whose references are other photos; leave it out, or set data.own_photo"
            )

    @property
    def method(self) -> Method:
        """The method to train."""
        return METHODS[self.adapter.method]

    @property
    def recipe(self) -> Recipe:
        """The method's training recipe."""
        recipe = self.method.recipe
        assert recipe is not None  # checked by AdapterSection
        return recipe

    @property
    def needs(self) -> Needs:
        """The face features that the method reads."""
        return self.method.usual_needs


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration from a TOML file.

    Keys missing from the file and the overrides get the values that the method was published with.

    Args:
        overrides: `section.key=value`, applied last. Values are written as in TOML; the quotes around a string are optional.

    Raises:
        ConfigError: no such file, broken TOML, an unknown key, a value of the wrong type or out of range.
    """
    with naming(path, overrides):
        return parse_config(RunConfig, with_method_defaults(read_toml(path, overrides)))


def read_record(path: Path) -> RunConfig:
    """Read the configuration that a run saved with its results, in this release or an earlier one.

    Raises:
        ConfigError: as `read_config`.
    """
    with naming(path, ()):
        return parse_config(RunConfig, with_new_names(RunConfig, read_toml(path)))


def with_method_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add the method's published settings (`Recipe.defaults`) to the tables of a run, where these do not set them."""
    adapter = content.get("adapter", {})
    adapter = adapter if isinstance(adapter, Mapping) else {}
    merged: dict[str, Any] = dict(content)
    method = METHODS.get(str(adapter.get("method", "")))
    if method is None or method.recipe is None:
        return merged
    recipe = method.recipe
    for defaults in (recipe.branches.get(str(adapter.get("branch", "")), {}), recipe.defaults):
        for section, values in defaults.items():
            given = merged.get(section, {})
            if isinstance(given, Mapping):
                merged[section] = {**values, **given}
    return merged


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """List the settings that differ: "train.learning_rate was 0.1 and is 0.2"."""
    found = []
    for section in dataclasses.fields(RunConfig):
        then, today = (getattr(config, section.name) for config in (before, now))
        for entry in dataclasses.fields(then):
            was, is_now = getattr(then, entry.name), getattr(today, entry.name)
            if was != is_now:
                found.append(f"{section.name}.{entry.name} was {_in_words(was)} and is {_in_words(is_now)}")
    return found


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {literal(entry)}' for name, entry in value.items())}}}"
    return literal(value)
