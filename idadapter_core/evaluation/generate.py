"""Generate images of people with a base model and its adapters: the interface, and its implementation with the trainer's pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..adapter import Adapter, load_adapter
from ..data.index import Index
from ..data.references import features_of
from ..errors import ConfigError, InputError
from ..faces.images import Image
from ..mechanisms.text import with_identity_clause
from ..methods import METHODS
from ..schedule import RescaleSchedule
from ..stable_diffusion.base import load_base
from ..stable_diffusion.networks import load_networks
from ..stable_diffusion.pipeline import Pipeline, Strengths, to_levels
from ..types import Identity, Mix
from .config import EvaluationConfig, RunEntry, SamplingConfig
from .people import Person, RealPhoto
from .prompts import Prompt

VERSION = 1  # of image generation; increase it to generate all images again


@dataclass(frozen=True)
class Drawing:
    """Specification of one image."""

    run: RunEntry | None  # None: the base model alone
    scale: float
    person: Person
    prompt: Prompt
    seed: int

    @property
    def references(self) -> tuple[RealPhoto, ...]:
        """The adapter's reference photos."""
        if self.run is None:
            return ()
        return self.person.references[: self.run.references or None]


class Generator(Protocol):
    """Interface of an image generator."""

    def recipe(self, drawing: Drawing) -> dict[str, Any]:
        """Everything that the image depends on, as plain values."""

    def generate(self, drawing: Drawing) -> Image:
        """Generate the image (H, W, 3), RGB uint8."""

    def recognizer(self, run: RunEntry) -> str:
        """Digest of the face recogniser that the run's adapter was trained with; empty if not recorded."""


def recipe_of(drawing: Drawing, sampling: SamplingConfig, digests: dict[str, str]) -> dict[str, Any]:
    """The recipe of a drawing. `digests` names all models involved."""
    facts: dict[str, Any] = {
        "version": VERSION,
        "models": digests,
        "prompt": drawing.prompt.words(drawing.person.class_word),
        "negative": sampling.negative,
        "seed": drawing.seed,
        "steps": sampling.steps,
        "cfg": sampling.cfg,
        "size": sampling.size,
        "precision": sampling.precision,
    }
    if drawing.run is not None:
        facts |= {
            "scale": drawing.scale,
            "parts": drawing.run.parts,
            "rescale": drawing.run.rescale,
            "references": [photo.row.sha256 for photo in drawing.references],
        }
    return facts


class PipelineGenerator:
    """Generates with the trainer's pipeline.

    It holds one adapter in the UNet and one identity at a time, so request the images grouped by run, and within a run by person.
    """

    def __init__(self, config: EvaluationConfig, index: Index) -> None:
        """Raises:
        IDAdapterError: a file is missing or unusable, or a run uses a feature that its adapter does not have."""
        self._sampling = config.sampling
        self._index = index
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._adapters = _load_adapters(config.runs)
        self._networks = {}
        for method in sorted({adapter.method for adapter in self._adapters.values()}):
            networks, digest = load_networks(config.base, METHODS[method].usual_needs, needs_detector=False)
            networks.recognizer.to(self._device)
            if networks.vision is not None:
                networks.vision.to(self._device)
            self._networks[method] = networks, digest
        dtype = torch.bfloat16 if config.sampling.precision == "bf16" else torch.float32
        self._base = load_base(config.base, self._device, dtype)
        self._pipeline: Pipeline | None = None
        self._identity: tuple[tuple[str, ...], Identity] | None = None

    def recipe(self, drawing: Drawing) -> dict[str, Any]:
        digests = {"base": self._base.digest}
        if drawing.run is not None:
            adapter = self._adapters[drawing.run.name]
            networks, digest = self._networks[adapter.method]
            vision = "" if networks.vision is None else networks.vision.digest
            digests |= {"adapter": adapter.digest, "recognizer": digest, "vision": vision}
        return recipe_of(drawing, self._sampling, digests)

    def recognizer(self, run: RunEntry) -> str:
        recognizer: str = self._adapters[run.name].config.recognizer
        return recognizer

    def generate(self, drawing: Drawing) -> Image:
        adapter = None if drawing.run is None else self._adapters[drawing.run.name]
        sampling = self._sampling
        picture = self._pipeline_of(adapter).generate(
            _prompt(drawing, adapter),
            identity=None if adapter is None else self._identity_of(drawing, adapter),
            seed=drawing.seed,
            steps=sampling.steps,
            cfg=sampling.cfg,
            width=sampling.size,
            height=sampling.size,
            negative=sampling.negative,
            strengths=None if adapter is None else _strengths(drawing, adapter),
        )
        try:
            return to_levels(picture, sampling.precision, "sampling.precision")
        except InputError as error:
            run = "the base model" if drawing.run is None else f"{drawing.run.name}, scale {drawing.scale:g}"
            raise InputError(
                f"{run}, {drawing.person.name}, {drawing.prompt.text!r}, seed {drawing.seed}: {error}"
            ) from error

    def _pipeline_of(self, adapter: Adapter | None) -> Pipeline:
        if self._pipeline is None or self._pipeline.adapter is not adapter:
            if self._pipeline is not None:
                self._pipeline.close()
                if self._pipeline.adapter is not None:  # make room for the next one
                    self._pipeline.adapter.encoder.to("cpu")
                    self._pipeline.adapter.layers.to("cpu")
            self._pipeline = Pipeline(self._base, adapter)
        return self._pipeline

    def _identity_of(self, drawing: Drawing, adapter: Adapter) -> Identity:
        rows = [photo.row for photo in drawing.references]
        key = (adapter.digest, *(row.sha256 for row in rows))
        if self._identity is None or self._identity[0] != key:
            networks, digest = self._networks[adapter.method]
            features = features_of(self._index, rows, networks, digest, self._device)
            self._identity = key, adapter.encode(features, Mix(references=len(rows)))
        return self._identity[1]


def _load_adapters(runs: tuple[RunEntry, ...]) -> dict[str, Adapter]:
    """Load adapters by run name; runs with the same files share one."""
    loaded: dict[tuple[str, str], Adapter] = {}
    for run in runs:
        key = (run.path, run.text_branch)
        if key not in loaded:
            loaded[key] = load_adapter(Path(run.path), Path(run.text_branch) if run.text_branch else None)
        adapter = loaded[key]
        has = {"text": adapter.config.has_text_branch, "adapter": adapter.config.has_adapter_branch}
        if not has.get(run.parts, True):
            raise ConfigError(
                f"{run.name}: only the {run.parts} part is to act, but {adapter.name} has none; change parts, or name another file"
            )
        mechanisms = adapter.mechanisms
        if run.rescale and mechanisms.decoupled is None and mechanisms.text != "states":
            raise ConfigError(
                f"{run.name}: normalized rescaling is for attention beside the text's, but {adapter.name} is an {adapter.kind.title}; "
                "set rescale to false"
            )
    return {run.name: loaded[run.path, run.text_branch] for run in runs}


def _prompt(drawing: Drawing, adapter: Adapter | None) -> str:
    word = drawing.person.class_word
    text = drawing.prompt.words(word)
    if adapter is None or adapter.mechanisms.text != "word" or not _text_acts(drawing, adapter):
        return text
    return with_identity_clause(text, word)


def _text_acts(drawing: Drawing, adapter: Adapter) -> bool:
    return drawing.run is not None and drawing.run.parts != "adapter" and adapter.config.has_text_branch


def _strengths(drawing: Drawing, adapter: Adapter) -> Strengths:
    assert drawing.run is not None
    # An identity word is in the prompt or not; the scale then applies only in the UNet.
    text_scale = 1.0 if adapter.mechanisms.text == "word" else drawing.scale
    return Strengths(
        adapter=0.0 if drawing.run.parts == "text" else drawing.scale,
        text=text_scale if _text_acts(drawing, adapter) else 0.0,
        rescale=RescaleSchedule() if drawing.run.rescale else None,
    )
