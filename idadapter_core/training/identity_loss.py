"""Where a face is in a loss: L_id, and weights of the denoising error.

L_id is the distance between the person in a predicted image and the wanted person, differentiable up to the prediction. A similarity
transform from landmarks aligns the face to the recogniser's 112 x 112. Landmarks are constants: no gradient passes through a detector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..faces.align import TEMPLATE, TEMPLATE_SIZE


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Least-squares similarity transforms (B, 2, 3) from points `source` (B, P, 2) to `target` (B or 1, P, 2).

    In complex numbers, with both sets centred, rotation and scale are a = sum(conj(z) w) / sum(|z|^2): Umeyama's solution in the
    plane without an SVD.
    """
    z, w = (torch.view_as_complex(p.double().contiguous()) for p in (source, target.expand_as(source)))
    z_mean, w_mean = z.mean(1, keepdim=True), w.mean(1, keepdim=True)
    z, w = z - z_mean, w - w_mean
    a = (z.conj() * w).sum(1) / (z.abs() ** 2).sum(1)
    shift = w_mean[:, 0] - a * z_mean[:, 0]
    rows = [torch.stack([a.real, -a.imag, shift.real], 1), torch.stack([a.imag, a.real, shift.imag], 1)]
    return torch.stack(rows, 1).to(source.dtype)


def image_to_crop(landmarks: Tensor) -> Tensor:
    """Affine maps (B, 2, 3) from pixels of the image to pixels of an aligned face, for landmarks (B, 5, 2)."""
    template = torch.as_tensor(TEMPLATE, dtype=landmarks.dtype, device=landmarks.device)[None]
    return similarity(landmarks, template)


def crop_to_image(landmarks: Tensor) -> Tensor:
    """Affine maps (B, 2, 3) from pixels of an aligned face to pixels of the image, for landmarks (B, 5, 2).

    The inverse of the best fit of the landmarks to the template, as in `faces.align`. The best fit of the template to the landmarks
    would differ for every face not shaped exactly like the template, and show the recogniser a larger face than it is used to.
    """
    to_crop = image_to_crop(landmarks)
    linear = torch.linalg.inv(to_crop[:, :, :2])
    return torch.cat([linear, -linear @ to_crop[:, :, 2:]], 2)


def face_weights(landmarks: Tensor, height: int, width: int, cell: int, weight: float) -> Tensor:
    """Weights (B, height, width) of the errors of latents, of mean 1 for each image: `weight` times as large in the aligned face.

    Args:
        landmarks: (B, 5, 2) in pixels of the image.
        cell: pixels of a latent, along each side.
    """
    to_crop = image_to_crop(landmarks.double())
    rows, columns = (cell * (torch.arange(side) + 0.5) - 0.5 for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centers = torch.stack([x, y, torch.ones_like(x)], -1).double()
    points = torch.einsum("bij,hwj->bhwi", to_crop, centers)
    inside = ((points > -0.5) & (points < TEMPLATE_SIZE - 0.5)).all(-1)
    weights = 1 + (weight - 1) * inside.float()
    return weights / weights.mean((1, 2), keepdim=True)


def align_faces(images: Tensor, landmarks: Tensor) -> Tensor:
    """Align faces (B, 3, 112, 112) from images (B, 3, H, W), differentiable with respect to the images.

    Args:
        landmarks: (B, 5, 2), x and y in pixels of the image, pixel centres at integers, as in `faces.align`. Preferably on the CPU,
            to avoid synchronising with the images' device.

    If a face is more than twice as large as the crop, the image is first averaged down: sampling it at 112 points a side would leave
    most pixels without a gradient.
    """
    faces = []
    for image, matrix in zip(images, crop_to_image(landmarks), strict=True):
        factor = max(1, int(torch.linalg.det(matrix[:, :2]).abs().sqrt()))
        if factor > 1:
            image = F.avg_pool2d(image[None], factor, ceil_mode=True, count_include_pad=False)[0]
            # Keeps pixel centres in place: (x + 1/2) / factor - 1/2.
            matrix = torch.cat([matrix[:, :2], matrix[:, 2:] + 0.5], 1) / factor
            matrix[:, 2] -= 0.5
        faces.append(_warp(image[None], matrix))
    return torch.cat(faces)


def _warp(image: Tensor, matrix: Tensor) -> Tensor:
    """Sample (1, 3, H, W) at the pixels of a crop, mapped by `matrix` (2, 3); black outside."""
    height, width = image.shape[-2:]
    axis = torch.arange(TEMPLATE_SIZE, device=image.device, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    matrix = matrix.float().to(image.device, non_blocking=True)
    points = torch.stack([x, y, torch.ones_like(x)], -1) @ matrix.T
    size = points.new_tensor([width, height])
    grid = (2 * points + 1) / size - 1  # grid_sample counts from pixel edges
    # Black is -1 in an image of -1..1: shift it to 0, the padding value.
    return F.grid_sample(image.float() + 1, grid[None], mode="bilinear", align_corners=False) - 1


def identity_cosines(
    faces: Tensor, wanted: Tensor, recognizer: Callable[[Tensor], tuple[Tensor, object]]
) -> Tensor:
    """cos(R(x0_hat), f_a) of each predicted face (B,); L_id is 1 - cos (IDAdapter, Eq. 9).

    Args:
        faces: (B, 3, 112, 112), see `align_faces`.
        wanted: (B, 512) embeddings of the person.
        recognizer: frozen face network: (B, 3, 112, 112) RGB in -1..1 -> embedding, stages.
    """
    embedding, _ = recognizer(faces)
    return F.cosine_similarity(embedding.float(), wanted.float(), dim=-1)
