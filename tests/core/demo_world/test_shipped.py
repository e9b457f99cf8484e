"""The networks that are shipped, on a few pictures of people whom they have not met. Bounds are loose: the figures stand in
docs/demo_world.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from idadapter_core.demo_world import Factors, Person, Pictures, render, seed_of
from idadapter_core.demo_world.build.sex_and_age import squares
from idadapter_core.demo_world.shipped import SEX_AND_AGE_FILE, face_package

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
