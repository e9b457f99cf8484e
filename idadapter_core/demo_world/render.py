"""Renders pictures of people together with their ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .arrays import Floats, normals, reduce, screen
from .body import draw_body
from .canvas import Canvas
from .captions import caption
from .factors import Factors
from .hair import casters, draw_beard, draw_hair
from .head import load_head
from .identity import Person
from .mesh import Pose, posed_meshes, rest_meshes
from .scene import background
from .shading import Lighting
from .shot import SUPERSAMPLING, Camera, Shot
from .styles import Sheet, finish
from .wear import HATS, draw_accessory

MIN_SIZE, MAX_SIZE = 32, 1024
BATCH = 16  # meshes computed at a time: enough to share work, few enough for the processor's cache


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures of H × W pixels. Pixel coordinates: x to the right, y down; (0, 0) is the center of the first pixel."""

    pixels: npt.NDArray[np.uint8]  # (N, H, W, 3) RGB
    masks: npt.NDArray[np.uint8]  # (N, H, W) 255 where the person hides the background
    landmarks: (
        Floats  # (N, 5, 2) left eye, right eye, nose, left and right mouth corner, as seen in the picture
    )
    boxes: Floats  # (N, 4) x1, y1, x2, y2 of the head without hair and neck; may reach beyond the border
    people: tuple[Person, ...]
    factors: tuple[Factors, ...]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)


def render(
    people: Sequence[Person], factors: Sequence[Factors], size: int = 128, *, backend: str | None = None
) -> Pictures:
    """Render one picture per pair of person and factors. A picture depends only on its own pair and the size.

    Args:
        size: pixels along a side, 32..1024.
        backend: "numpy" or "numba", which give the same pixels; None: numba where it is installed.

    Raises:
        InputError: the numbers of people and factors differ or are 0, or the size is out of range.
    """
    if len(people) != len(factors) or not people:
        raise InputError(
            f"every picture needs a person and factors, got {len(people)} people and {len(factors)} factors; "
            "repeat a person for each of their pictures."
        )
    if not isinstance(size, (int, np.integer)) or not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(
            f"the size of a picture must be a whole number within {MIN_SIZE}..{MAX_SIZE} pixels, got {size}; choose another one."
        )
    drawn = [
        picture
        for start in range(0, len(people), BATCH)
        for picture in _render_batch(
            people[start : start + BATCH], factors[start : start + BATCH], size, backend
        )
    ]
    pixels, masks, landmarks, boxes = (np.stack(part) for part in zip(*drawn, strict=True))
    captions = tuple(caption(person, factor) for person, factor in zip(people, factors, strict=True))
    return Pictures(pixels, masks, landmarks, boxes, tuple(people), tuple(factors), captions)


def _render_batch(
    people: Sequence[Person], factors: Sequence[Factors], size: int, backend: str | None
) -> list[tuple[np.ndarray, ...]]:
    different = list(dict.fromkeys(people))
    rest = rest_meshes(different)[[different.index(person) for person in people]]
    turned, still, poses = posed_meshes(rest, people, factors)
    return [
        _picture(person, factor, meshes, pose, size, backend)
        for person, factor, *meshes, pose in zip(people, factors, still, turned, poses, strict=True)
    ]


def _picture(
    person: Person, factors: Factors, meshes: Sequence[Floats], pose: Pose, size: int, backend: str | None
) -> tuple[np.ndarray, ...]:
    head, (still, mesh) = load_head(), meshes
    directions = normals(mesh, head.everything)
    hair, hat = person.look.hair, factors.accessory in HATS
    shadows = [(mesh, head.surface[mesh[head.surface][:, :, 1].max(1) > -3])]
    if (shade := casters(mesh, directions, hair, hat)) is not None:
        shadows.append(shade)
    samples = size * SUPERSAMPLING
    canvas = Canvas.over(background(factors.background, factors.background_seed, samples))
    camera = Camera(samples, factors.zoom, factors.shift)
    lighting = Lighting.of(factors.light, shadows, backend)
    shot = Shot(head, person, factors, camera, still, mesh, directions, pose, lighting, canvas, backend)
    draw_body(shot)
    draw_hair(shot, hat)
    draw_beard(shot)
    draw_accessory(shot)
    return _develop(shot)


def _develop(shot: Shot) -> tuple[np.ndarray, ...]:
    """Return the pixels, mask, landmarks and box of a painted canvas."""
    canvas, n = shot.canvas, shot.camera.size
    kind = canvas.kind.reshape(n, n)
    sheet = Sheet(
        screen(canvas.light).reshape(n, n, 3), canvas.depth.reshape(n, n), kind, shot.factors.seed, n / 256
    )
    image = reduce(finish(shot.factors.style, sheet), SUPERSAMPLING)
    mask = reduce(canvas.cover.reshape(n, n), SUPERSAMPLING)
    skull = shot.camera.in_pixels(shot.mesh[shot.head.skull])
    return (
        np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8),
        np.rint(mask * 255).astype(np.uint8),
        _landmarks(shot),
        np.concatenate([skull.min(0), skull.max(0)]),
    )


def _landmarks(shot: Shot) -> Floats:
    left, right = shot.head.eye_vertices
    eyes = np.stack(
        [shot.mesh[right].mean(0), shot.mesh[left].mean(0)]
    )  # the person's right eye is left in the picture
    others = shot.mesh[list(shot.head.landmark_vertices)]
    return shot.camera.in_pixels(np.concatenate([eyes, others]))
