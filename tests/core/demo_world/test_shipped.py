"""The networks that are shipped, on a few pictures of people not seen in training. Bounds are loose: the figures stand in
docs/demo_world.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from idadapter_core.demo_world import Factors, Person, Pictures, render, seed_of
from idadapter_core.demo_world.build.batches import as_tensor
from idadapter_core.demo_world.build.measures import recognition
from idadapter_core.demo_world.build.sex_and_age import squares
from idadapter_core.demo_world.build.train_recognizers import aligned_crops
from idadapter_core.demo_world.readers import load_reader
from idadapter_core.demo_world.shipped import (
    CLIP_VISION,
    READER,
    RECOGNIZER_FILE,
    SEX_AND_AGE_FILE,
    face_package,
    shipped,
)
from idadapter_core.faces.align import square_crop
from idadapter_core.faces.detector import open_analyzer
from idadapter_core.faces.iresnet import load_iresnet
from idadapter_core.stable_diffusion.vision import load_vision
from idadapter_core.types import Face

PEOPLE = 20


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    rng = np.random.default_rng(11)
    people = [Person.sample(seed_of("test", 1000 + k)) for k in range(PEOPLE)]
    return render(people, [Factors.sample(rng, style="photo") for _ in people], 128)


def _run(path: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_sex_is_seen(pictures: Pictures) -> None:
    path = face_package() / SEX_AND_AGE_FILE
    sexes = np.array([person.sex == "man" for person in pictures.people])
    assert 5 < sexes.sum() < 15
    seen = _run(path, squares(pictures.pixels, pictures.boxes))
    assert (seen[:, :2].argmax(1) == sexes).mean() >= 0.9
    assert ((0.15 < seen[:, 2]) & (seen[:, 2] < 0.8)).all(), "age / 100"


def test_people_are_told_apart() -> None:
    """By the file, and by the torch network that is read from it."""
    rng = np.random.default_rng(12)
    people = [Person.sample(seed_of("test", 2000 + k // 3)) for k in range(36)]
    shown = render(people, [Factors.sample(rng, style="photo", accessory="none") for _ in people], 128)
    crops = aligned_crops(shown.pixels, shown.landmarks)
    path = face_package() / RECOGNIZER_FILE
    embeddings = _run(path, crops)
    found = recognition(embeddings, np.arange(36) // 3)
    assert found["auc"] >= 0.98
    assert found["rank_one"] >= 0.9
    with torch.no_grad():
        ours, stages = load_iresnet(path, any_layers=True)(crops)
    assert recognition(ours.numpy(), np.arange(36) // 3) == pytest.approx(found, abs=0.02)
    assert [stage.shape[2] for stage in stages] == [56, 28, 14, 7]
    swapped = _run(path, crops.flip(1))
    rows, others = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in (embeddings, swapped))
    assert (rows * others).sum(1).mean() < 0.9, "red and blue are not the same to it"


def test_the_real_insightface_finds_the_face_and_its_landmarks(pictures: Pictures) -> None:
    analyzer = open_analyzer(face_package(), "cpu")
    found = [analyzer.detect(picture) for picture in pictures.pixels]
    assert all(found)
    assert np.mean([len(faces) == 1 for faces in found]) >= 0.9
    truth = pictures.landmarks
    seen = np.array([faces[0].landmarks for faces in found])
    distance = np.linalg.norm(truth[:, 1] - truth[:, 0], axis=1)
    assert (np.linalg.norm(seen - truth, axis=2).mean(1) / distance).mean() < 0.2
    assert (seen[:, 0, 0] < seen[:, 1, 0]).all(), "left and right as in the picture"
    sexes = ["M" if person.sex == "man" else "F" for person in pictures.people]
    assert np.mean([faces[0].sex == sex for faces, sex in zip(found, sexes, strict=True)]) >= 0.9
    swapped = [analyzer.detect(picture[:, :, ::-1]) for picture in pictures.pixels]
    scores = [np.mean([faces[0].score if faces else 0 for faces in some]) for some in (found, swapped)]
    assert scores[1] < scores[0], "red and blue are not the same to it"


def test_the_reader_names_what_pictures_show(pictures: Pictures) -> None:
    reader = load_reader(shipped(READER))
    read = reader.read(as_tensor(pictures.pixels))
    for factor in ("expression", "direction", "background", "accessory", "style"):
        shown = [str(getattr(factors, factor)) for factors in pictures.factors]
        assert np.mean([one == other for one, other in zip(read[factor], shown, strict=True)]) >= 0.85, factor


def test_clip_vision_tells_people_apart() -> None:
    rng = np.random.default_rng(13)
    people = [Person.sample(seed_of("test", 3000 + k // 3)) for k in range(36)]
    shown = render(people, [Factors.sample(rng, style="photo") for _ in people], 128)
    heads = [
        square_crop(picture, Face(tuple(map(float, box)), (), 1.0))
        for picture, box in zip(shown.pixels, shown.boxes, strict=True)
    ]
    encoder = load_vision(shipped(CLIP_VISION))
    with torch.no_grad():
        patches, _ = encoder(encoder.preprocess(heads))
    assert patches.shape == (36, 64, 128)
    means = patches.mean(1)
    rows = (means - means.mean(0)) / means.std(0)
    assert recognition(rows.numpy(), np.arange(36) // 3)["auc"] >= 0.7
