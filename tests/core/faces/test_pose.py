"""Head poses from five landmarks."""

from __future__ import annotations

import numpy as np
import pytest

from idadapter_core.errors import FaceError, InputError
from idadapter_core.faces.align import TEMPLATE
from idadapter_core.faces.pose import Pose, estimate_pose, model, rotation


def seen(shape: np.ndarray, pose: Pose, eye_distance: float = 60.0) -> np.ndarray:
    """A 3D face (5, 3) as a camera far away sees it, in pixels."""
    turned = (shape - shape.mean(axis=0)) @ rotation(pose).T
    return turned[:, :2] * eye_distance + [300, 200]


def angles(pose: Pose) -> list[float]:
    return [pose.yaw, pose.pitch, pose.roll]


@pytest.mark.parametrize(
    "pose",
    [
        Pose(0, 0, 0),
        Pose(35, 0, 0),
        Pose(-35, 0, 0),
        Pose(0, 25, 0),
        Pose(0, -25, 0),
        Pose(0, 0, 40),
        Pose(20, 30, 10),
        Pose(-65, -20, -30),
    ],
    ids=str,
)
def test_known_rotations_come_back(pose: Pose) -> None:
    assert angles(estimate_pose(seen(model(), pose))) == pytest.approx(angles(pose), abs=0.01)


def test_the_signs_are_those_of_insightface() -> None:
    to_the_right = seen(model(), Pose(30, 0, 0))
    eyes = to_the_right[:2].mean(axis=0)
    assert to_the_right[2, 0] > eyes[0], "the nose points to the right of the image"
    up = seen(model(), Pose(0, 25, 0))
    level = seen(model(), Pose(0, 0, 0))
    assert up[2, 1] - up[:2, 1].mean() < level[2, 1] - level[:2, 1].mean(), "the nose points up"
    clockwise = seen(model(), Pose(0, 0, 20))
    assert clockwise[1, 1] > clockwise[0, 1], "the right eye of the image is lower"


def test_an_aligned_face_looks_at_the_camera() -> None:
    assert angles(estimate_pose(TEMPLATE)) == pytest.approx([0, 0, 0], abs=0.7)


def test_noise_and_other_faces_change_little() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        pose = Pose(rng.uniform(-60, 60), rng.uniform(-40, 40), rng.uniform(-40, 40))
        points = seen(model(), pose) + rng.normal(0, 0.02 * 60, (5, 2))
        errors.append(np.abs(np.subtract(angles(estimate_pose(points)), angles(pose))))
    assert (np.mean(errors, axis=0) < [2, 2.5, 2]).all()

    long_nose = model() * [1, 1, 1]
    long_nose[2, 2] *= 1.2
    for yaw in (0.0, 20.0, 40.0):
        assert estimate_pose(seen(long_nose, Pose(yaw, 0, 0))).yaw == pytest.approx(yaw, abs=3.5)


def test_place_and_size_do_not_matter() -> None:
    points = seen(model(), Pose(25, -10, 5))
    assert angles(estimate_pose(points * 7 - 4000)) == pytest.approx(angles(estimate_pose(points)), abs=1e-6)


@pytest.mark.parametrize("bad", [np.full((5, 2), np.nan), np.ones((5, 2))])
def test_no_face_at_all(bad: np.ndarray) -> None:
    with pytest.raises(FaceError, match="landmarks"):
        estimate_pose(bad)
    with pytest.raises(InputError, match="five landmarks"):
        estimate_pose(bad[:4])
