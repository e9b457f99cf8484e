"""L_id: how far the person in a predicted image is from the person wanted, differentiable up to the prediction.

The face is brought to the recogniser's 112 x 112 by a similarity transform from landmarks. Landmarks are constants: nothing is
differentiated through a detector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..faces.align import TEMPLATE, TEMPLATE_SIZE


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """The similarity transforms (B, 2, 3) that map points `source` (B, P, 2) onto `target` (B or 1, P, 2) with least squares.

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


def crop_to_image(landmarks: Tensor) -> Tensor:
    """Where the pixels of an aligned face lie in the picture: affine maps (B, 2, 3), for landmarks (B, 5, 2).

    The inverse of the best fit of the landmarks onto the template, as in `faces.align`. The best fit of the template onto the
    landmarks would be another map wherever a face is not of exactly the template's shape, and the recogniser would see it
    larger than it is used to.
    """
    template = torch.as_tensor(TEMPLATE, dtype=landmarks.dtype, device=landmarks.device)[None]
    to_crop = similarity(landmarks, template)
    linear = torch.linalg.inv(to_crop[:, :, :2])
    return torch.cat([linear, -linear @ to_crop[:, :, 2:]], 2)


def align_faces(images: Tensor, landmarks: Tensor) -> Tensor:
    """Aligned faces (B, 3, 112, 112) of images (B, 3, H, W), differentiable with respect to the images.

    Args:
        landmarks: (B, 5, 2), x and y in pixels of the image, pixel centres at whole numbers, as `faces.align` has them. Best on
            the CPU: then nothing waits for the images' device.

    Where a face is more than twice as large as the crop, the image is averaged down first: sampling it at 112 points a side
    would leave most pixels without a gradient.
    """
    faces = []
    for image, matrix in zip(images, crop_to_image(landmarks), strict=True):
        factor = max(1, int(torch.linalg.det(matrix[:, :2]).abs().sqrt()))
        if factor > 1:
            image = F.avg_pool2d(image[None], factor, ceil_mode=True, count_include_pad=False)[0]
            # The middle of a pixel stays where it is: (x + 1/2) / factor - 1/2.
            matrix = torch.cat([matrix[:, :2], matrix[:, 2:] + 0.5], 1) / factor
            matrix[:, 2] -= 0.5
        faces.append(_warp(image[None], matrix))
    return torch.cat(faces)


def _warp(image: Tensor, matrix: Tensor) -> Tensor:
    """(1, 3, H, W) sampled at the pixels of a crop, `matrix` (2, 3) from there; black outside."""
    height, width = image.shape[-2:]
    axis = torch.arange(TEMPLATE_SIZE, device=image.device, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    matrix = matrix.float().to(image.device, non_blocking=True)
    points = torch.stack([x, y, torch.ones_like(x)], -1) @ matrix.T
    size = points.new_tensor([width, height])
    grid = (2 * points + 1) / size - 1  # grid_sample counts from the edges of pixels
    # Black is -1 in an image of -1..1: shift so that what lies outside is black, too.
    return F.grid_sample(image.float() + 1, grid[None], mode="bilinear", align_corners=False) - 1


def identity_cosines(
    faces: Tensor, wanted: Tensor, recognizer: Callable[[Tensor], tuple[Tensor, object]]
) -> Tensor:
    """cos(R(x0_hat), f_a) of each predicted face (B,); L_id is 1 - that (IDAdapter, Eq. 9).

    Args:
        faces: (B, 3, 112, 112), see `align_faces`.
        wanted: (B, 512) embeddings of the person.
        recognizer: frozen face network: (B, 3, 112, 112) RGB in -1..1 -> embedding, stages.
    """
    embedding, _ = recognizer(faces)
    return F.cosine_similarity(embedding.float(), wanted.float(), dim=-1)
