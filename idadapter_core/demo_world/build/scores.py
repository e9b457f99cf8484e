"""Measures the demo world's networks on people that none of them was trained on, from the files of a build or from the shipped ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from ...faces.detector import FaceAnalyzer, open_analyzer
from ...faces.iresnet import load_iresnet
from ...stable_diffusion.vision import load_vision
from ..autoencoder import load_autoencoder
from ..base import load_base
from ..readers import load_reader
from ..second_recognizer import load_second_recognizer
from ..shipped import (
    AUTOENCODER,
    BASE,
    CLIP_VISION,
    JUDGE,
    PACKAGE,
    READER,
    RECOGNIZER_FILE,
    SEX_AND_AGE_FILE,
)
from .batches import Pool
from .detector import detection_scores
from .measures import recognition
from .pictures import open_pictures
from .settings import Settings
from .sex_and_age import sex_and_age_scores
from .sheets import write_pairs, write_sheet
from .train_autoencoder import latent_statistics, rebuilt, signal_to_noise
from .train_base import base_scores
from .train_readers import reader_scores
from .train_recognizers import embeddings_of, first_of, recognizer_scores
from .train_vision import vision_scores

JUDGED = ("test_photo", "test_shape")  # groups of pictures of the recognisers' scores
DETECTED = 200  # pictures of the detector's scores


@dataclass(frozen=True)
class Evidence:
    """Files to measure, and the pictures to measure them with."""

    files: Path  # of a build, or the shipped assets
    pictures: Path
    settings: Settings
    sheets: Path | None = None  # folder for pictures to look at; None: none are written

    def pool(self, *groups: str) -> Pool:
        return Pool([open_pictures(self.pictures, group) for group in groups])


@dataclass(frozen=True)
class Measure:
    """How a stage's files are measured."""

    scores: Callable[[Evidence], Mapping[str, float]]
    groups: tuple[str, ...] = ()  # of pictures, which must be drawn before


def analyzer_of(folder: Path) -> FaceAnalyzer:
    """Open the face package in a folder, on the CPU."""
    return open_analyzer(folder, "cpu")


def embed(network: nn.Module, crops: Tensor) -> Tensor:
    """The embedding (B, 512) of a network that returns stages beside it."""
    return first_of(network(crops))


def call(network: nn.Module, crops: Tensor) -> Tensor:
    """The embedding of a network that returns nothing else."""
    result: Tensor = network(crops)
    return result


def _detector(evidence: Evidence) -> Mapping[str, float]:
    pool = evidence.pool("test")
    numbers = np.linspace(0, len(pool) - 1, min(DETECTED, len(pool))).astype(np.int64)
    return detection_scores(analyzer_of(evidence.files / PACKAGE).detect, pool, numbers)


def _sex_and_age(evidence: Evidence) -> Mapping[str, float]:
    path = evidence.files / PACKAGE / SEX_AND_AGE_FILE
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def network(crops: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": crops.numpy()})[0])

    return sex_and_age_scores(network, evidence.pool("test"))


def _readers(evidence: Evidence) -> Mapping[str, float]:
    return reader_scores(load_reader(evidence.files / READER), evidence.pool("test"))


def _judged(evidence: Evidence) -> dict[str, Pool]:
    return {name.removeprefix("test_"): evidence.pool(name) for name in JUDGED}


def _recognizer(evidence: Evidence) -> Mapping[str, float]:
    """Also with the landmarks that the package's own detector finds in photos."""
    network = load_iresnet(evidence.files / PACKAGE / RECOGNIZER_FILE, any_layers=True)
    photos, analyzer = evidence.pool("test_photo"), analyzer_of(evidence.files / PACKAGE)
    pixels = photos.pixels(np.arange(len(photos)))
    landmarks = photos.landmarks.copy()
    for number, picture in enumerate(pixels):
        if faces := analyzer.detect(picture):
            landmarks[number] = faces[0].landmarks
    found = recognition(embeddings_of(network, embed, pixels, landmarks), photos.people)
    return {
        **recognizer_scores(network, embed, _judged(evidence)),
        **{f"found_{name}": value for name, value in found.items()},
    }


def _second_recognizer(evidence: Evidence) -> Mapping[str, float]:
    return recognizer_scores(load_second_recognizer(evidence.files / JUDGE), call, _judged(evidence))


def _autoencoder(evidence: Evidence) -> Mapping[str, float]:
    network, photos = load_autoencoder(evidence.files / AUTOENCODER), evidence.pool("test_photo")
    originals, copies = photos.pixels(np.arange(len(photos))), rebuilt(network, photos)
    # Unlike the reader, it was not used in the training.
    judge = load_iresnet(evidence.files / PACKAGE / RECOGNIZER_FILE, any_layers=True)
    before, after = (
        recognition(embeddings_of(judge, embed, pixels, photos.landmarks), photos.people)["rank_one"]
        for pixels in (originals, copies)
    )
    if evidence.sheets is not None:
        write_pairs(originals[:12], copies[:12], evidence.sheets / "autoencoder.png")
    return {
        "signal_to_noise": round(signal_to_noise(originals, copies), 2),
        "rank_one_of_originals": before,
        "rank_one": after,
        "kept": round(1 + after - before, 4),
        **latent_statistics(network, photos),
    }


def _vision(evidence: Evidence) -> Mapping[str, float]:
    return vision_scores(load_vision(evidence.files / CLIP_VISION), evidence.pool("test_photo"))


def _base(evidence: Evidence) -> Mapping[str, float]:
    judges = load_autoencoder(evidence.files / AUTOENCODER), load_reader(evidence.files / READER)
    scores, pictures = base_scores(
        load_base(evidence.files / BASE), *judges, evidence.settings.judged_prompts
    )
    if evidence.sheets is not None:
        write_sheet(pictures[:48], evidence.sheets / "base.png")
    return scores


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "detector": Measure(_detector, ("test",)),
        "sex_and_age": Measure(_sex_and_age, ("test",)),
        "readers": Measure(_readers, ("test",)),
        "recognizer": Measure(_recognizer, JUDGED),
        "second_recognizer": Measure(_second_recognizer, JUDGED),
        "autoencoder": Measure(_autoencoder, ("test_photo",)),
        "decoder": Measure(_autoencoder, ("test_photo",)),
        "vision": Measure(_vision, ("test_photo",)),
        "base": Measure(_base),
    }
)
"""By stage."""
