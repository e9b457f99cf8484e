from __future__ import annotations

import cv2
import numpy as np
import pytest
from insightface.utils import face_align

from idadapter_core.errors import FaceError, InputError
from idadapter_core.faces.align import TEMPLATE, align_face, similarity_transform, square_crop
from idadapter_core.types import Face
from tests.tiny.face_package import MarkedFace, synthesize


def _random_landmarks(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        angle, scale = rng.uniform(-np.pi, np.pi), rng.uniform(0.2, 8)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        noise = rng.normal(0, 3, (5, 2))
        result.append(
            ((TEMPLATE + noise) @ rotation.T * scale + rng.uniform(-200, 900, 2)).astype(np.float32)
        )
    return result


@pytest.mark.filterwarnings("ignore::FutureWarning")  # insightface calls an old name of scikit-image
def test_matrix_agrees_with_insightface() -> None:
    mirrored = [points * np.float32([-1, 1]) + np.float32([800, 0]) for points in _random_landmarks(50)]
    for points in _random_landmarks(300) + mirrored:
        expected = face_align.estimate_norm(points, 112)
        # The shift of a far away face is a large number: compare where the landmarks land.
        ours = similarity_transform(points)
        homogeneous = np.c_[points, np.ones(5)]
        np.testing.assert_allclose(homogeneous @ ours.T, homogeneous @ expected.T, atol=3e-4)
        np.testing.assert_allclose(ours[:, :2], expected[:, :2], atol=3e-5)


def test_crop_is_the_published_warp() -> None:
    face = MarkedFace(310, 290, 150, roll=20, identity=2)
    photo = synthesize(faces=[face])
    matrix = similarity_transform(face.landmarks)
    np.testing.assert_array_equal(
        align_face(photo, face.landmarks), cv2.warpAffine(photo, matrix, (112, 112))
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_crop_agrees_with_insightface() -> None:
    face = MarkedFace(310, 290, 150, roll=-35, identity=2)
    photo = synthesize(faces=[face])
    theirs = face_align.norm_crop(photo, face.landmarks.astype(np.float32), 112)
    difference = np.abs(theirs.astype(int) - align_face(photo, face.landmarks).astype(int))
    assert (
        difference > 2
    ).mean() < 0.001  # the two matrices differ in the last digits; hard edges may round over


def test_landmarks_land_on_the_template() -> None:
    matrix = similarity_transform(TEMPLATE * 3 + 40)
    np.testing.assert_allclose(matrix, [[1 / 3, 0, -40 / 3], [0, 1 / 3, -40 / 3]], atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_landmarks_that_are_not_finite(value: float) -> None:
    points = TEMPLATE.copy()
    points[2, 1] = value
    with pytest.raises(FaceError, match="not finite"):
        similarity_transform(points)


def test_eyes_too_close() -> None:
    with pytest.raises(FaceError, match=r"eyes are 3\.\d px apart, at least 4 px"):
        similarity_transform(TEMPLATE / 10)


def test_equal_landmarks() -> None:
    with pytest.raises(FaceError, match=r"eyes are 0\.0 px apart"):
        similarity_transform(np.full((5, 2), 50.0))


def test_wrong_number_of_landmarks() -> None:
    with pytest.raises(InputError, match=r"five landmarks \(5, 2\), got \(68, 2\)"):
        similarity_transform(np.zeros((68, 2)))


def test_face_outside_the_photo() -> None:
    photo = np.zeros((200, 200, 3), np.uint8)
    with pytest.raises(FaceError, match="of the face lies inside the photo"):
        align_face(photo, TEMPLATE - [90, 0])
    assert align_face(photo, TEMPLATE - [30, 0]).shape == (112, 112, 3)


@pytest.mark.parametrize(
    "box", [(20.0, 30.0, 60.0, 70.0), (-10.0, -10.0, 30.0, 30.0), (70.0, 50.0, 110.0, 90.0)]
)
def test_square_crop_centres_the_head_and_repeats_the_edge(box: tuple[float, float, float, float]) -> None:
    photo = np.arange(80 * 100 * 3, dtype=np.uint32).reshape(80, 100, 3).astype(np.uint8)
    crop = square_crop(photo, Face(box=box, landmarks=((0.0, 0.0),) * 5, score=1.0), scale=2.0)
    assert crop.shape == (80, 80, 3)
    x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
    inside = (min(max(y, 0), 79), min(max(x, 0), 99))
    assert (crop[40, 40] == photo[inside]).all()
    corner = (min(max(y - 40, 0), 79), min(max(x - 40, 0), 99))
    assert (crop[0, 0] == photo[corner]).all()
