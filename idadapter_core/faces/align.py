"""Face alignment: the 112 x 112 crop used by ArcFace-style networks, and the square crop of the head for CLIP vision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import FaceError, FacePackageError, InputError
from ..types import Face
from .images import Image

# insightface's positions of eyes, nose and mouth corners in a 112 px crop (insightface/utils/face_align.py, `arcface_dst`).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float64,
)
TEMPLATE_SIZE = 112
MIN_EYE_DISTANCE = 4.0  # pixels; closer eyes give an arbitrary rotation and a blurred crop
MIN_INSIDE = 0.5  # fraction of the crop that must lie in the photo

Landmarks = Sequence[Sequence[float]] | NDArray[np.floating]


def similarity_transform(landmarks: Landmarks) -> NDArray[np.float64]:
    """Fit the rotation, scale and shift (2, 3) that best maps five landmarks (5, 2), in pixels, onto the template.

    Least squares over proper similarities, which is one division with points as complex numbers. Equal to Umeyama's
    method as used by insightface.

    Raises FaceError for landmarks that are not finite or eyes closer than 4 px.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise InputError(f"face alignment needs five landmarks (5, 2), got {points.shape}")
    if not np.isfinite(points).all():
        raise FaceError("the face's landmarks are not finite numbers; choose another face or photo")
    eye_distance = float(np.linalg.norm(points[1] - points[0]))
    if eye_distance < MIN_EYE_DISTANCE:
        raise FaceError(
            f"the face's eyes are {eye_distance:.1f} px apart, at least {MIN_EYE_DISTANCE:.0f} px are needed; "
            "use a larger photo or crop closer"
        )
    source = points[:, 0] + 1j * points[:, 1]
    target = TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]
    centered = source - source.mean()
    factor = np.vdot(centered, target - target.mean()) / np.vdot(centered, centered)
    shift = target.mean() - factor * source.mean()
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])


def align_face(
    image: NDArray[np.uint8], landmarks: Landmarks, size: int = TEMPLATE_SIZE
) -> NDArray[np.uint8]:
    """Warp a photo (H, W, 3), RGB uint8, to the aligned crop (size, size, 3), RGB uint8.

    Pixel-identical to insightface's `norm_crop`: bilinear, black outside the photo.

    Raises FaceError for unusable landmarks (see `similarity_transform`) and if more than half of the crop lies
    outside the photo.
    """
    try:
        import cv2
    except ImportError as error:
        raise FacePackageError(
            "aligning faces needs OpenCV; run `python -m pip install opencv-python-headless` with ComfyUI's Python"
        ) from error
    matrix = similarity_transform(landmarks)
    inside = _share_inside(matrix, image.shape[0], image.shape[1])
    if inside < MIN_INSIDE:
        raise FaceError(
            f"only {inside:.0%} of the face lies inside the photo, at least {MIN_INSIDE:.0%} are needed; "
            "use a photo that shows the whole face"
        )
    crop = cv2.warpAffine(image, matrix * (size / TEMPLATE_SIZE), (size, size), borderValue=0.0)
    return np.asarray(crop, dtype=np.uint8)


def _share_inside(matrix: NDArray[np.float64], height: int, width: int) -> float:
    linear, shift = matrix[:, :2], matrix[:, 2]
    ys, xs = np.mgrid[:TEMPLATE_SIZE, :TEMPLATE_SIZE]
    crop_points = np.stack([xs.ravel(), ys.ravel()], axis=1)
    photo_points = (crop_points - shift) @ np.linalg.inv(linear).T
    inside = (photo_points >= 0).all(axis=1) & (photo_points <= [width - 1, height - 1]).all(axis=1)
    return float(inside.mean())


def square_crop(image: Image, face: Face, scale: float = 1.5) -> Image:
    """Cut out the head around a face (S, S, 3), RGB uint8: a square of `scale` times the larger side of the face's box, centred on it.

    Beyond the photo its edge pixels are repeated. The crop keeps the photo's orientation: it is not rotated or warped.
    """
    height, width = image.shape[:2]
    side = max(round(scale * max(face.width, face.height)), 1)
    center_x, center_y = face.center
    columns = np.clip(round(center_x - side / 2) + np.arange(side), 0, width - 1)
    rows = np.clip(round(center_y - side / 2) + np.arange(side), 0, height - 1)
    return image[rows[:, None], columns[None, :]]
