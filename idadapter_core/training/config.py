"""The configuration of a training run: TOML into dataclasses that check themselves.

Every key has a default, so a configuration names only what differs. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import typing
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..methods import METHODS
from .toml import BACKSLASHES, parse_value, read_table

T = TypeVar("T")

FAMILIES = ("sd15", "sd21", "sdxl")
PREDICTIONS = ("auto", "epsilon", "v_prediction")
BRANCHES = ("adapter", "text")
ALIGNMENTS = ("target", "detector")
GATES = ("noise", "detector")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("no", "bf16")
CLASS_WORD, CAPTION = "<class word>", "<caption>"  # what prompts may leave open
_OPEN = re.compile(r"<[A-Za-z][^<>]*>")
_PATHS = ("path", "config", "tokenizer", "vae", "vision", "recognizer", "face_package")


@dataclass(frozen=True)
class BaseConfig:
    """The frozen models around the adapter. Paths on disk; nothing is fetched."""

    path: str = ""  # Stable Diffusion: a diffusers folder or a single-file checkpoint
    family: str = "sd15"  # sd15, sd21 or sdxl
    prediction: str = "auto"  # what the UNet predicts; auto: as the folder's scheduler says, or as ComfyUI tells it from a file
    config: str = (
        ""  # for a single file of other sizes than published: a folder with diffusers configurations
    )
    tokenizer: str = ""  # for a single file: a folder with CLIP's vocab.json and merges.txt
    vae: str = ""  # another VAE; empty: the base's own
    vision: str = ""  # CLIP vision for IDAdapter: a folder of transformers, or a file of weights
    recognizer: str = ""  # face network: a torch IResNet (.pth, .safetensors, .onnx)
    face_package: str = ""  # folder of an insightface package; only for a detector in L_id

    def __post_init__(self) -> None:
        one_of("base.family", self.family, FAMILIES)
        one_of("base.prediction", self.prediction, PREDICTIONS)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    index: str = ""  # written by `python -m idadapter_core.data scan`
    cache: str = ""  # folder of latents, crops and features; empty: computed when they are needed
    resolution: int = 512  # side of the square pictures, pixels
    references: int = (
        4  # N photos of a person in a sample (IDAdapter; UniID always has one, the target itself)
    )
    min_photos: int = 1  # people with fewer usable photos are left out
    prompt: str = (
        ""  # for all samples, with <caption> and <class word>; empty: the method's own (see `prompts`)
    )
    flip: bool = True  # half of the targets are mirrored
    cache_features: bool = (
        True  # the cache holds what CLIP vision and the face network's stages give, not only crops
    )
    max_bad_share: float = 0.05  # of rows that the scan found unusable; above it a run stops
    workers: int = 2

    def __post_init__(self) -> None:
        at_least("data.resolution", self.resolution, 8)
        if self.resolution % 8:
            raise ConfigError(
                f"data.resolution must be a multiple of 8 (a latent is 8 pixels), got {self.resolution}"
            )
        at_least("data.references", self.references, 1)
        at_least("data.min_photos", self.min_photos, 1)
        at_least("data.workers", self.workers, 0)
        within("data.max_bad_share", self.max_bad_share, 0, 1)
        _require_known("data.prompt", self.prompt, (CLASS_WORD, CAPTION))


@dataclass(frozen=True)
class AdapterSection:
    """What is trained."""

    method: str = "idadapter"
    start: str = ""  # an adapter file to go on from; empty: a fresh adapter of the family's preset
    branch: str = "adapter"  # UniID trains one branch in a run
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method's own config, over the preset

    def __post_init__(self) -> None:
        one_of("adapter.method", self.method, tuple(METHODS))
        one_of("adapter.branch", self.branch, BRANCHES)
        known = {entry.name for entry in dataclasses.fields(METHODS[self.method].config)}
        for name in self.settings:
            if name not in known:
                raise ConfigError(
                    f"adapter.settings.{name} is no setting of {self.method}{nearest(name, known)}"
                )


@dataclass(frozen=True)
class LossConfig:
    """L = L_SD + F(x0_hat) * lambda * L_id (IDAdapter, Eq. 8 and 9)."""

    identity: float = 0.1  # lambda; 0 switches L_id off
    align: str = (
        "target"  # where the face of x0_hat is: as in the target image, or as a detector sees it (the paper)
    )
    gate: str = "noise"  # F: by noise level, or 1 where a detector finds a face (the paper)
    gate_alpha: float = 0.5  # smallest alpha-bar at which L_id counts
    min_snr: float = 0.0  # gamma of min-SNR weighting; 0: off, as in both papers

    def __post_init__(self) -> None:
        one_of("loss.align", self.align, ALIGNMENTS)
        one_of("loss.gate", self.gate, GATES)
        at_least("loss.identity", self.identity, 0)
        within("loss.gate_alpha", self.gate_alpha, 0, 1)
        at_least("loss.min_snr", self.min_snr, 0)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    steps: int = 50_000
    batch: int = 4  # samples of a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of a step
    lr: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0  # steps
    clip: float = 0.0  # largest norm of the gradient; 0: off
    ema: float = 0.0  # decay of the average of the weights; 0: off
    drop_identity: float = 0.05  # share of samples without the identity
    drop_text: float = 0.05  # share of samples without the rest of the prompt
    drop_both: float = 0.05  # share of samples with neither, as negative prompts are used
    precision: str = "no"  # bf16: autocast over fp32 master weights
    checkpointing: bool = False  # of the UNet's blocks: less memory for more time
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("train.schedule", self.schedule, SCHEDULES)
        if self.precision == "fp16":
            raise ConfigError(
                "train.precision: fp16 is not offered, since gradients vanish in it unless the loss is scaled; bf16 takes as little memory "
                "and needs no scaling"
            )
        one_of("train.precision", self.precision, PRECISIONS)
        for name in ("steps", "batch", "accumulate"):
            at_least(f"train.{name}", getattr(self, name), 1)
        if not self.lr > 0:
            raise ConfigError(f"train.lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "warmup", "clip"):
            at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("ema", "drop_identity", "drop_text", "drop_both"):
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
class OutputConfig:
    """Where it goes."""

    folder: str = "runs/adapter"
    save_every: int = 1000  # steps
    keep_last: int = 3  # checkpoints
    keep_every: int = 10_000  # checkpoints of these steps stay; 0: none
    log_every: int = 10  # steps
    validate_every: int = 0  # steps between measurements of the loss on test people; 0: none
    validate_samples: int = 64
    sample_every: int = 0  # steps between sample grids; 0: none
    sample_steps: int = 20
    sample_cfg: float = 5.0
    sample_people: int = 2  # test people in a grid
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
            _require_known("output.prompts", prompt, (CLASS_WORD,))


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --set, which all programs with a TOML file have."""
    parser.epilog = (
        "docs/training.md goes through it all. Examples of TOML files are in configs; every setting is explained in "
        "idadapter_core/training/config.py, those of an evaluation in idadapter_core/evaluation/config.py."
    )
    parser.add_argument("--config", type=Path, required=True, help="the TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a setting of the file; may be given several times",
    )


# What a run of a method has where its file says nothing: as published, where that differs from the defaults above.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "idadapter": {},
    "uniid": {
        "data": {"flip": False},
        "loss": {"identity": 0.0},
        "train": {
            "lr": 1e-5,
            "weight_decay": 0.01,
            "drop_identity": 0.1,
            "drop_text": 0.0,
            "drop_both": 0.0,
        },
    },
}
_UNIID_TEXT_LR = 1e-4


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a TOML file, with `section.key=value` overrides on top (values as TOML writes them, quotes may be
    left out around a text). What neither says is as the method was published.

    Raises:
        ConfigError: no such file, broken TOML, an unknown key, a value of another type or outside its range.
    """
    with naming(path, overrides):
        return parse_config(RunConfig, with_method_defaults(read_toml(path, overrides)))


@contextlib.contextmanager
def naming(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Errors about a configuration say where it comes from."""
    try:
        yield
    except ConfigError as error:
        if f"{error}".startswith(f"{path}"):
            raise
        raise ConfigError(f"{path}{' and --set' if overrides else ''}: {error}") from error


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file, with `section.key=value` overrides on top.

    Raises:
        ConfigError: no such file, broken TOML, or an override that names nothing.
    """
    content = read_table(path)
    for override in overrides:
        _override(content, override)
    return content


def with_method_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a run, with what its method has where they say nothing (`METHOD_DEFAULTS`)."""
    adapter = content.get("adapter", {})
    adapter = adapter if isinstance(adapter, Mapping) else {}
    merged: dict[str, Any] = dict(content)
    for section, values in METHOD_DEFAULTS.get(str(adapter.get("method", "")), {}).items():
        given = content.get(section, {})
        if isinstance(given, Mapping):
            merged[section] = {**values, **given}
            if section == "train" and adapter.get("branch") == "text" and "lr" not in given:
                merged[section]["lr"] = _UNIID_TEXT_LR
    return merged


def parse_config(kind: type[T], content: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a table, strictly: only known keys, each of its own type.

    Raises:
        ConfigError: names the key, what it should be and what it is.
    """
    hints = typing.get_type_hints(kind)
    known = {entry.name: hints[entry.name] for entry in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{where}{key}"
        if key not in known:
            raise ConfigError(f"unknown setting {name}{nearest(key, known)}")
        expected = known[key]
        if dataclasses.is_dataclass(expected) and not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a section, write it as [{name}], got {value!r}")
        values[key] = _value(name, value, expected)
    return kind(**values)


def config_toml(config: Any) -> str:
    """A configuration as TOML, every value written out, which `parse_config` reads back as it was."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        content = getattr(config, section.name)
        if isinstance(content, tuple):
            for table in content:
                lines += [f"[[{section.name}]]", *_table(table, section.name), ""]
        else:
            lines += [f"[{section.name}]", *_table(content, section.name), ""]
    return "\n".join(lines)


def _table(table: Any, name: str) -> list[str]:
    lines: list[str] = []
    tables: list[str] = []
    for entry in dataclasses.fields(table):
        value = getattr(table, entry.name)
        if isinstance(value, Mapping):
            tables += [
                f"[{name}.{entry.name}]",
                *(f"{_literal(k)} = {_literal(v)}" for k, v in value.items()),
            ]
        else:
            lines.append(f"{entry.name} = {_literal(value)}")
    return lines + tables


def _literal(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False)  # TOML writes numbers, booleans and texts in the same way


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"--set takes section.key=value, for example train.lr=1e-5, got {override!r}")
    value = parse_value(text.strip())
    table = content
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {override}: {part} is no section of single values; change it in the file"
            )
    table[path[-1]] = value


def _value(name: str, value: Any, expected: Any) -> Any:
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a table, got {value!r}")
        return parse_config(typing.cast(Any, expected), value, f"{name}.")
    origin = typing.get_origin(expected)
    if origin is tuple:
        kinds = typing.get_args(expected)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        if kinds[-1] is not Ellipsis and len(value) != len(kinds):
            raise ConfigError(f"{name} must have {len(kinds)} entries, got {value!r}")
        of_tables = dataclasses.is_dataclass(kinds[0])
        return tuple(
            _value(f"{name}[{number}]" if of_tables else name, entry, kinds[0])
            for number, entry in enumerate(value)
        )
    if origin is not None:  # a table of settings
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[expected]}, got {value!r}")
    if expected is str and not _is_text(value):
        raise ConfigError(
            f"{name}: {value!r} has bytes that are no UTF-8; give it in UTF-8, and rename a file or folder of that name"
        )
    if expected is str and value.startswith(("~/", "~\\")):
        return str(Path(value).expanduser())
    return value


def _is_text(value: str) -> bool:
    """Whether no byte is in it that the command line or a name on the disk had and UTF-8 has not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown name: which one was perhaps meant, or all there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(names)}"


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        close = difflib.get_close_matches(value, options, 1, cutoff=0.5)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{name} must be one of {', '.join(options)}, got {value!r}{meant}")


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least or value == float("inf"):
        raise ConfigError(f"{name} must be a finite number of at least {least}, got {value}")


def _require_known(name: str, prompt: str, known: tuple[str, ...]) -> None:
    """Refuse a prompt that leaves something open which nobody fills in."""
    for found in _OPEN.findall(prompt):
        if found not in known:
            raise ConfigError(
                f"{name}: nothing is known to stand for {found} in {prompt!r}{nearest(found, known)}"
            )


def _require_path(name: str, value: str) -> None:
    """Refuse control characters, which come of the backslashes of a Windows path in double quotes: "C:\new\train"."""
    if any(character < " " for character in value):
        raise ConfigError(f"{name}: {value!r} has a control character; {BACKSLASHES}")


def existing(name: str, value: str) -> Path:
    """The file or folder that a setting names.

    Raises:
        ConfigError: there is none, or it cannot be looked at.
    """
    _require_path(name, value)
    path = Path(value).expanduser()
    try:
        is_there = path.exists()
    except OSError as error:  # a folder above it that may not be entered
        raise ConfigError(
            f"{name}: {value} cannot be looked at ({error.strerror}); correct the path, or the rights of its folders"
        ) from error
    if not is_there:
        where = "" if path.is_absolute() else f" (that is {path.absolute()})"
        raise ConfigError(f"{name}: {value} is not there{where}; correct the path")
    return path


def writable(name: str, value: str) -> Path:
    """The folder that a setting names, which need not be there yet.

    Raises:
        ConfigError: it is a file, or cannot be written. Better told before hours of work than after them.
    """
    _require_path(name, value)
    folder = Path(value).expanduser()
    above = [folder.absolute(), *folder.absolute().parents]
    try:
        there = next((path for path in above if path.is_symlink() or path.exists()), None)
        if there is None or not there.exists():  # a drive, or what a link points to
            raise ConfigError(
                f"{name}: {there or folder} leads nowhere; name another folder, or bring its disk back"
            )
        if not there.is_dir():
            raise ConfigError(f"{name}: {there} is a file; name a folder")
        probe = there / f".{uuid.uuid4().hex}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{name}: {folder} cannot be written ({error.strerror}); name another folder, or make this one writable"
        ) from error
    return folder


def require_paths(base: BaseConfig, without: Sequence[str], others: Mapping[str, str]) -> None:
    """See that all files and folders are there before the first of them is read. What is empty is not looked at.

    Args:
        without: paths of `base` that are not needed.
        others: further settings and what they name.

    Raises:
        ConfigError: one of them is not there.
    """
    of_base = {f"base.{name}": getattr(base, name) for name in _PATHS if name not in without}
    for name, value in {**of_base, **others}.items():
        if value:
            existing(name, value)


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """What differs between two configurations: "train.lr was 0.1 and is 0.2"."""
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
        return f"{{{', '.join(f'{name} = {_literal(entry)}' for name, entry in value.items())}}}"
    return _literal(value)


def within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low} and {high}, got {value}")
