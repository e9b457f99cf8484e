"""Says which programs and model files are here, which of them work, and what each method still lacks.

Nothing is downloaded or changed. `python -m idadapter_core doctor` and the node ID Adapter Doctor print it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch

from .adapter import identify_adapter
from .demo_world.digests import changed_files
from .demo_world.shipped import ASSETS, PACKAGE, SEX_AND_AGE_FILE
from .errors import CheckpointError, FacePackageError, IDAdapterError, MismatchError
from .faces.detector import started_providers
from .faces.iresnet import load_iresnet
from .faces.packages import DETECTION, GENDER_AGE, RECOGNITION, find_packages, read_package
from .files import PICKLE_SUFFIXES, file_digest
from .methods import METHODS, Config, Method
from .published import (
    ADAPTERS,
    CHECKPOINTS,
    CLIP_VISION,
    IDENTITIES,
    INSIGHTFACE,
    RECOGNIZERS,
    PublishedFile,
    Role,
)
from .sites import attention_sites, family_name
from .types import Remark

ROOT = Path(__file__).parents[1]
COMFYUI = ROOT.parents[min(1, len(ROOT.parents) - 1)]  # where the pack lies in its custom_nodes
UNKNOWN, OTHER = "", "other models"  # kinds of checkpoints beside the families
SUFFIXES: Mapping[str, frozenset[str]] = {
    ADAPTERS: frozenset({".safetensors", *PICKLE_SUFFIXES}),
    RECOGNIZERS: frozenset({".safetensors", ".onnx", *PICKLE_SUFFIXES}),
    IDENTITIES: frozenset({".safetensors"}),
    CHECKPOINTS: frozenset({".safetensors", *PICKLE_SUFFIXES}),
    CLIP_VISION: frozenset({".safetensors", *PICKLE_SUFFIXES}),
}
PROGRAMS, FILES, NEEDS, DEMO_WORLD = "Programs", "Model files", "What each method needs", "Demo world"
SELF_TEST = "Self-test"
"""Titles of the sections."""
MARGIN = 0.2
"""Of likeness above the base model's pictures. Of twelve people tried in the self-test the least gained .19, the one that it draws .58."""
REPAIR = "run `python install.py` in this pack's folder with ComfyUI's own Python, then restart"


@dataclass(frozen=True)
class ModelFiles:
    """The files of ComfyUI's model folders that concern this pack, by their names in lists."""

    adapters: Mapping[str, Path] = field(default_factory=dict)
    recognizers: Mapping[str, Path] = field(default_factory=dict)
    identities: Mapping[str, Path] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    clip_vision: Mapping[str, Path] = field(default_factory=dict)
    face_packages: Mapping[str, Path] = field(default_factory=dict)  # folders

    @classmethod
    def below(cls, models: Path) -> ModelFiles:
        """List the files below a ComfyUI's `models` folder, and the face packages of insightface's own folder."""
        own = models / ADAPTERS
        return cls(
            {
                name: path
                for name, path in _listed(own, ADAPTERS).items()
                if Path(name).parts[0] not in (RECOGNIZERS, IDENTITIES)
            },
            _listed(own / RECOGNIZERS, RECOGNIZERS),
            _listed(own / IDENTITIES, IDENTITIES),
            _listed(models / CHECKPOINTS, CHECKPOINTS),
            _listed(models / CLIP_VISION, CLIP_VISION),
            find_packages([models / INSIGHTFACE, *home_packages()]),
        )


@dataclass(frozen=True)
class Section:
    """A part of the report: what was looked at, and the findings."""

    title: str
    remarks: tuple[Remark, ...]

    @property
    def is_ok(self) -> bool:
        """Whether it has no warning."""
        return not any(remark.is_warning for remark in self.remarks)


@dataclass(frozen=True)
class SelfTest:
    """Likeness (cosine, -1..1) of faces drawn in the demo world to the person's photos, with an adapter and without it."""

    method: str
    with_adapter: float
    without: float
    seconds: float

    @property
    def is_ok(self) -> bool:
        """Whether the adapter draws the person."""
        return self.with_adapter >= self.without + MARGIN


def examine(
    files: ModelFiles, programs: Mapping[str, str], step: Callable[[], object] = lambda: None
) -> list[Section]:
    """Look at programs and files.

    Args:
        programs: versions of what runs this, by name, for example {"ComfyUI": "0.30.0"}.
        step: called after each file; it may raise to stop.
    """
    here = _Found(files, step)
    return [
        Section(PROGRAMS, tuple(_programs(programs))),
        Section(FILES, tuple(here.remarks)),
        Section(NEEDS, tuple(_needs(here))),
        Section(DEMO_WORLD, tuple(_demo_world())),
    ]


def self_tested(run: Callable[[], SelfTest]) -> Section:
    """Run the self-test: `run` draws and measures. Whatever it raises is the finding."""
    try:
        found = run()
    except Exception as error:
        reason = str(error) if isinstance(error, IDAdapterError) else f"{type(error).__name__}: {error}"
        return Section(SELF_TEST, (Remark(f"failed: {reason}", is_warning=True),))
    return Section(SELF_TEST, (_verdict(found),))


def text_of(sections: Iterable[Section]) -> str:
    """Write a report; lines with a warning begin with an exclamation mark."""
    lines = []
    for section in sections:
        lines += [section.title]
        lines += [f"  {'!' if remark.is_warning else ' '} {remark.text}" for remark in section.remarks]
    return "\n".join(lines) + "\n"


def summary(files: ModelFiles) -> str:
    """One line for the log at startup, from names alone: no file is read and no library is imported."""
    counts = {
        "adapter": len(files.adapters),
        "face network": len(files.recognizers),
        "face package": len(files.face_packages),
    }
    found = ", ".join(f"{count or 'no'} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    missing = [name for name in ("insightface", "onnxruntime") if importlib.util.find_spec(name) is None]
    lack = f" Missing: {' and '.join(missing)}; {REPAIR}." if missing else ""
    return (
        f"ComfyUI-IDAdapter {own_version()}: {found} in the model folders.{lack} The node ID Adapter Doctor says what is missing; "
        "the template demo_world needs nothing."
    )


def own_version() -> str:
    """Version of this pack."""
    project = ROOT / "pyproject.toml"
    found = re.search(r'^version = "(.+)"$', project.read_text("utf-8"), re.M) if project.is_file() else None
    return found[1] if found else _version("comfyui-idadapter") or "of unknown version"


def home_packages() -> list[Path]:
    """Return the folder in which insightface itself keeps packages; empty without a home directory, as in some containers."""
    with contextlib.suppress(RuntimeError):
        return [Path.home() / ".insightface"]
    return []


def _listed(folder: Path, kind: str) -> dict[str, Path]:
    """Files of a kind in a folder and its subfolders, also linked ones, by their paths in it."""
    found: dict[str, Path] = {}
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        found |= {
            (Path(place) / name).relative_to(folder).as_posix(): Path(place) / name
            for name in names
            if Path(name).suffix in SUFFIXES[kind]
        }
    return dict(sorted(found.items()))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _runtimes() -> dict[str, str]:
    """Versions of the distributions that own the package onnxruntime. They overwrite each other, so only one may be there."""
    owners = importlib.metadata.packages_distributions().get("onnxruntime", [])
    return {name: _version(name) for name in sorted(set(owners))}


def _programs(programs: Mapping[str, str]) -> Iterable[Remark]:
    versions = {"ComfyUI-IDAdapter": own_version(), **programs, "Python": platform.python_version()}
    yield Remark(", ".join(f"{name} {version}" for name, version in versions.items()))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    yield Remark(f"torch {torch.__version__}, {device}")
    try:
        started = started_providers(ASSETS / PACKAGE / SEX_AND_AGE_FILE)
    except FacePackageError as error:
        yield Remark(str(error), is_warning=True)
        return
    runtimes = _runtimes()
    named = " and ".join(f"{name} {version}" for name, version in runtimes.items()) or "onnxruntime"
    working = [name for name, works in started.items() if works]
    yield Remark(
        f"insightface {_version('insightface') or '(a copy without a version)'}; {named}: sessions start on "
        f"{', '.join(working) or 'nothing'}",
        is_warning=not working,
    )
    if len(runtimes) > 1:
        yield Remark(
            f"{named} are both installed and overwrite each other's files: {REPAIR}.",
            is_warning=True,
        )
    if torch.cuda.is_available() and torch.version.cuda and "cuda" not in working:
        yield Remark(
            f"faces are found on the CPU, because onnxruntime starts no CUDA session beside torch's CUDA {torch.version.cuda}; a few photos "
            "need no more"
        )


class _Found:
    """The files that are there and usable, and a remark on each."""

    def __init__(self, files: ModelFiles, step: Callable[[], object]) -> None:
        self.adapters: list[tuple[Method, Config]] = []
        self.families = Counter(map(_family_of, files.checkpoints.values()))
        self.widths = set(map(vision_width, files.clip_vision.values()))
        self.remarks: list[Remark] = []
        self.has: set[Role] = set()
        looks: tuple[tuple[Mapping[str, Path], Callable[[str, Path], str], str], ...] = (
            (files.adapters, self._adapter, ADAPTERS),
            (files.recognizers, self._recognizer, f"{ADAPTERS}/{RECOGNIZERS}"),
            (files.face_packages, self._package, INSIGHTFACE),
        )
        for named, look, folder in looks:
            for name, path in named.items():
                try:
                    self.remarks.append(Remark(f"{folder}/{name}: {look(name, path)}"))
                except (IDAdapterError, OSError) as error:
                    self.remarks.append(Remark(f"{folder}/{name} is not usable: {error}", is_warning=True))
                step()
        self.remarks.append(Remark(self._others(files)))

    def _adapter(self, name: str, path: Path) -> str:
        method, config = identify_adapter(path)
        self.adapters.append((method, config))
        return f"{method.title}, {', '.join(method.describe(config)[:2])}; {_identified(path)}"

    def _recognizer(self, name: str, path: Path) -> str:
        network = load_iresnet(path)
        self.has.add("recognizer")
        blocks = "/".join(str(len(getattr(network, f"layer{stage}"))) for stage in (1, 2, 3, 4))
        return f"an IResNet of {blocks} blocks; {_identified(path)}"

    def _package(self, name: str, folder: Path) -> str:
        package = read_package(folder)
        self.has.add("detector")
        if RECOGNITION in package.models:
            self.has.add("face_package")
        tasks = {DETECTION: "detector", RECOGNITION: "recogniser", GENDER_AGE: "sex and age"}
        return "; ".join(
            f"{title} {package.models[task].name}, {_identified(package.models[task])}"
            if task in package.models
            else f"no {title}"
            for task, title in tasks.items()
        )

    def _others(self, files: ModelFiles) -> str:
        kinds = ", ".join(f"{count} {family or 'of unknown kind'}" for family, count in self.families.items())
        return (
            f"{len(files.checkpoints)} checkpoints{f' ({kinds})' if kinds else ''}, {len(files.clip_vision)} CLIP vision models, "
            f"{len(files.identities)} saved identities"
        )

    def covers(self, method: Method, file: PublishedFile) -> bool:
        """Whether a file of this role is there for a method."""
        own = [config for found, config in self.adapters if found is method]
        if file.role == "adapter":
            return any(config.has_adapter_branch for config in own)
        if file.role == "text_branch":
            return any(config.has_text_branch for config in own)
        if file.role == "checkpoint":
            made_for = {
                family_name(len(config.site_widths), config.context_width)
                for config in own
                if config.has_adapter_branch
            }
            return bool({UNKNOWN, *(made_for or file.families)} & set(self.families))
        if file.role == "clip_vision":
            return bool({0, file.width} & self.widths)
        return file.role in self.has


def _needs(found: _Found) -> Iterable[Remark]:
    for method in METHODS.values():
        missing = [file for file in method.published if not found.covers(method, file)]
        if not missing:
            yield Remark(f"{method.title}: everything is there")
        # A user of one method need not care for another.
        is_begun = any(owner is method for owner, _ in found.adapters)
        for file in missing:
            yield Remark(
                f"{method.title} lacks {file.name}. Folder: models/{file.folder}. From: {file.page}. Licence: {file.licence}.",
                is_warning=is_begun,
            )


def _demo_world() -> Iterable[Remark]:
    try:
        problems = changed_files(ASSETS)
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    if not problems:
        yield Remark("all files are as they were shipped")
    for problem in problems:
        yield Remark(problem, is_warning=True)


def _verdict(found: SelfTest) -> Remark:
    numbers = (
        f"{found.method} draws a person of the demo world with likeness {found.with_adapter:.2f}, the model alone with "
        f"{found.without:.2f}, in {found.seconds:.0f} s"
    )
    if found.is_ok:
        return Remark(f"ok: {numbers}")
    return Remark(
        f"failed: {numbers}; at least {MARGIN} more is expected. Report it with this whole text.",
        is_warning=True,
    )


def _identified(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes, SHA-256 {file_digest(path)}…"


def _family_of(path: Path) -> str:
    """Name of a checkpoint's family, from the names in a .safetensors file; `UNKNOWN` for other files, `OTHER` for other models."""
    if path.suffix != ".safetensors":
        return UNKNOWN
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            sites = attention_sites(file.keys())
            first = next(key for key in file.keys() if key.endswith("attn2.to_k.weight"))  # noqa: SIM118
            shape = file.get_slice(first).get_shape()
    except (MismatchError, OSError, safetensors.SafetensorError):
        return OTHER
    return family_name(len(sites), shape[1]) if len(shape) == 2 else UNKNOWN


def vision_width(path: Path) -> int:
    """Width of a CLIP vision model, from the names in a .safetensors file; 0 if they do not tell."""
    with contextlib.suppress(OSError, safetensors.SafetensorError):
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith(("embeddings.class_embedding", "visual.class_embedding")):
                    return int(file.get_slice(key).get_shape()[-1])
    return 0
