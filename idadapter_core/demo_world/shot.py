"""One picture while it is rendered: person, factors, mesh, camera, light and canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Floats, Ints, normalize, normals
from .canvas import Canvas
from .factors import Factors
from .head import Head
from .identity import Person
from .mesh import Pose
from .raster import Fragments, rasterize
from .shading import Lighting

SUPERSAMPLING = 2  # samples along a side of a pixel
DISTANCE = 13.0  # decimetres from the camera to the head
SPAN = 3.4  # width of the picture in decimetres, at the distance of the head
CENTER = (0.0, -0.22, -0.6)  # point in the middle of the picture, relative to the point between the eyes


@dataclass(frozen=True)
class Camera:
    """A perspective camera on the z axis."""

    size: int  # samples along a side
    zoom: float
    shift: tuple[float, float]

    def project(self, points: Floats) -> Floats:
        """Project points (M, 3), in decimetres, to (M, 3): x and y in samples, depth in decimetres."""
        center = np.array([CENTER[0] + self.shift[0], CENTER[1] + self.shift[1], CENTER[2]], np.float32)
        seen = points - center
        scale = np.float32(self.size / SPAN * self.zoom * DISTANCE) / (np.float32(DISTANCE) - seen[:, 2])
        middle = np.float32((self.size - 1) / 2)
        return np.stack([middle + seen[:, 0] * scale, middle - seen[:, 1] * scale, seen[:, 2]], 1)

    def in_pixels(self, points: Floats) -> Floats:
        """Project points (M, 3), in decimetres, to pixels (M, 2) of the finished picture; (0, 0) is the center of the first pixel."""
        return (self.project(points)[:, :2] + np.float32(0.5)) / SUPERSAMPLING - np.float32(0.5)


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture while it is rendered."""

    head: Head
    person: Person
    factors: Factors
    camera: Camera
    still: Floats  # (V, 3) mesh before the head turns
    mesh: Floats  # (V, 3) after the head turns
    normals: Floats  # (V, 3) of the mesh
    pose: Pose
    lighting: Lighting
    canvas: Canvas
    backend: str | None

    def draw(self, vertices: Floats, triangles: Ints, cull: bool = False) -> Fragments:
        """Rasterise a mesh as the camera sees it; see `rasterize`."""
        return rasterize(
            self.camera.project(vertices), triangles, self.camera.size, cull=cull, backend=self.backend
        )

    def attributes(
        self, fragments: Fragments, vertices: Floats, directions: Floats, places: Floats
    ) -> tuple[Floats, ...]:
        """Interpolate points, normals towards the camera and canonical coordinates (M, 3) of fragments from those of the vertices."""
        values = fragments.interpolate(np.concatenate([vertices, directions, places], 1).astype(np.float32))
        normal = normalize(values[:, 3:6])
        return values[:, :3], np.where(normal[:, 2:] < 0, -normal, normal), values[:, 6:9]

    def draw_solid(self, vertices: Floats, triangles: Ints) -> tuple[Fragments, Floats, Floats]:
        """Rasterise a separate object. Returns its fragments, their normals (M, 3) and their points (M, 3)."""
        fragments = self.draw(vertices, triangles)
        points, normal, _ = self.attributes(fragments, vertices, normals(vertices, triangles), vertices)
        return fragments, normal, points
