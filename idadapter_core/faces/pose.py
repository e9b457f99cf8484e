"""Head pose from the five landmarks of a detector alone, without a model file.

A small 3D face is fitted to the landmarks by least squares under a scaled orthographic camera: rotation, scale and shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import FaceError, InputError
from .align import TEMPLATE, Landmarks

_NOSE_DEPTH = 0.5
"""Distance of the nose tip in front of the eyes, in eye distances: about 32 of 63 mm on an adult."""
_MOUTH_DEPTH = 0.1
_STEPS = 20


@dataclass(frozen=True)
class Pose:
    """Angles of a head in degrees: 0 for a face that looks at the camera as in ArcFace's template of aligned crops.

    Signs and order of rotation (pitch, then yaw, then roll) are those of insightface's `face.pose`.
    """

    yaw: float  # above 0: the nose points to the right of the image
    pitch: float  # above 0: the nose points up
    roll: float  # above 0: clockwise in the image


def rotation(pose: Pose) -> NDArray[np.float64]:
    """Return the rotation matrix (3, 3) of a pose. Axes: x to the right of the image, y down, z towards the camera."""
    yaw, pitch, roll = np.deg2rad([pose.yaw, pose.pitch, pose.roll])
    about_x = np.array(
        [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]], dtype=np.float64
    )
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)


def estimate_pose(landmarks: Landmarks) -> Pose:
    """Estimate the pose of a face from five landmarks (5, 2), in pixels: eyes, nose, mouth corners, left before right in the image.

    Exact for a distant face with the model's shape. In photos, landmark errors of 2 % of the eye distance (standard deviation,
    along each axis) change yaw by 1.5, pitch by 2 and roll by 1.5 degrees on average; a nose a fifth longer than the model's adds
    3 degrees to yaws of 20 to 40. Pitch also has a constant offset per person of up to 20 degrees (the height of the nose between
    eyes and mouth), so only compare pitches of the same person.

    Raises:
        FaceError: landmarks that are not finite, or all in one place.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise InputError(f"a pose needs five landmarks (5, 2), got {points.shape}")
    points = points - points.mean(axis=0)
    size = float(np.linalg.norm(points))
    if not np.isfinite(size) or size < 1e-6:
        raise FaceError(
            "the face's landmarks are not finite numbers or all in one place; choose another face"
        )
    return _angles(_fit(points / size))


def model() -> NDArray[np.float64]:
    """Return the 3D face (5, 3) in eye distances: ArcFace's template made symmetric, with depths. Axes as in `rotation`."""
    mirrored = (TEMPLATE * [-1, 1])[[1, 0, 2, 4, 3]]
    flat = (TEMPLATE - TEMPLATE.mean(axis=0) + mirrored - mirrored.mean(axis=0)) / 2
    flat /= flat[1, 0] - flat[0, 0]
    return np.column_stack([flat, [0, 0, _NOSE_DEPTH, _MOUTH_DEPTH, _MOUTH_DEPTH]])


def _fit(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit the rotation (3, 3) whose scaled first two rows best map the model onto centred points (5, 2).

    Starts from an affine fit. Each step fills in the unknown depths of the points from the last rotation and solves for rotation
    and scale in closed form (Procrustes), which lowers the squared error of the known coordinates.
    """
    shape = model()
    shape -= shape.mean(axis=0)
    affine = np.linalg.lstsq(shape, points, rcond=None)[0].T
    left, scales, right = np.linalg.svd(affine, full_matrices=False)
    rows = left @ right
    turn = np.vstack([rows, np.cross(rows[0], rows[1])])
    scale = float(scales.mean())
    for _ in range(_STEPS):
        filled = np.column_stack([points, scale * shape @ turn[2]])
        left, scales, right = np.linalg.svd(filled.T @ shape)
        sign = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
        turn = left * sign @ right
        scale = float((scales * sign).sum() / (shape**2).sum())
    return turn


def _angles(turn: NDArray[np.float64]) -> Pose:
    yaw = np.arctan2(-turn[2, 0], np.hypot(turn[0, 0], turn[1, 0]))
    pitch = np.arctan2(turn[2, 1], turn[2, 2])
    roll = np.arctan2(turn[1, 0], turn[0, 0])
    return Pose(*(float(np.rad2deg(angle)) for angle in (yaw, pitch, roll)))
