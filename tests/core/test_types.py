"""The plain data: what it refuses, and with which words."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from idadapter_core.errors import IDAdapterError, InputError
from idadapter_core.types import MODES, FaceFeatures, Mix
from tests.tiny.features import face, face_features


def test_geometry_of_a_face() -> None:
    one = face()
    assert (one.width, one.height, one.area) == (50.0, 65.0, 3250.0)
    assert one.center == (55.0, 62.5)
    assert one.eye_distance == 30.0
    assert dataclasses.replace(one, box=(10.0, 10.0, 5.0, 20.0)).area == 0.0


@pytest.mark.parametrize("part", ["stages", "patch_tokens", "class_embedding", "crops", "faces"])
def test_every_part_must_describe_the_same_faces(part: str) -> None:
    features = face_features(1, 3)
    odd = {"stages": (torch.zeros(2, 64, 56, 56),), "faces": (face(), face())}.get(part, torch.zeros(2, 5, 4))
    with pytest.raises(InputError, match="the same 3 faces"):
        dataclasses.replace(features, **{part: odd})


def test_embedding_must_be_a_matrix() -> None:
    with pytest.raises(InputError, match=re.escape("must be (faces, width), got (512,)")):
        FaceFeatures(torch.zeros(512))


def test_pick_takes_all_parts_in_the_order_asked_for() -> None:
    features = dataclasses.replace(
        face_features(1, 3, faces=(face(0.1), face(0.2), face(0.3))),
        patch_tokens=torch.arange(3.0).view(3, 1, 1),
        class_embedding=torch.arange(3.0).view(3, 1),
        crops=torch.arange(3.0).view(3, 1, 1, 1),
    )
    picked = features.pick([2, 0, 2])
    assert len(picked) == 3
    assert torch.equal(picked.embedding, features.embedding[[2, 0, 2]])
    assert all(torch.equal(a, b[[2, 0, 2]]) for a, b in zip(picked.stages, features.stages, strict=True))
    for part in (picked.patch_tokens, picked.class_embedding, picked.crops):
        assert part is not None
        assert part.flatten().tolist() == [2, 0, 2]
    assert [each.score for each in picked.faces] == [0.3, 0.1, 0.3]
    assert picked.recognizer == features.recognizer


def test_features_compare_by_identity() -> None:
    assert face_features(1) != face_features(1)


def test_modes() -> None:
    assert [Mix(mode=mode).mode for mode in MODES] == list(MODES)
    with pytest.raises(
        InputError, match="mode must be one of auto, learned, concatenate, mean, got 'average'"
    ):
        Mix(mode="average")


def test_negative_references() -> None:
    with pytest.raises(InputError, match="references must be 0 .* or more, got -1"):
        Mix(references=-1)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_impossible_weights(weight: float) -> None:
    with pytest.raises(InputError, match="weights must be finite numbers of at least 0"):
        Mix(weights=(1.0, weight))


def test_weights_must_leave_a_face() -> None:
    with pytest.raises(InputError, match="all weights are 0"):
        Mix(weights=(0.0, 0.0))


def test_every_error_of_the_package_has_one_base() -> None:
    assert issubclass(InputError, IDAdapterError)
    assert issubclass(IDAdapterError, RuntimeError)
