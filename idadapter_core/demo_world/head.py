"""The head mesh shared by all people: a template, displacements that shape it, and its regions.

Vertices are in decimetres, x to the person's left (right in the picture), y up, z towards the camera. Points on the skin are identified
by their coordinates on the template ("canonical coordinates"), which do not depend on the shape of a person.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrays import Floats, Ints, smoothstep

ASSET = Path(__file__).parent / "assets" / "head.npz"
STEP = 1e-3  # decimetres; coordinates are stored as whole multiples, 0.1 mm
SKIN, EYE, UPPER_TEETH, LOWER_TEETH, TONGUE = range(5)  # kinds of vertices
AXIS = 0.35  # z of the vertical axis of angles around the head


@dataclass(frozen=True, eq=False)
class Morphs:
    """Named displacements, each stored for the vertices that it moves."""

    names: tuple[str, ...]
    moved: tuple[Ints, ...]
    offsets: tuple[Floats, ...]  # (number moved, 3)

    def add(self, meshes: Floats, index: int, amounts: Floats) -> None:
        """Add a displacement times amounts (N,) to meshes (N, V, 3), in place.

        Only products and sums are used, so that a mesh does not depend on the others of its batch.
        """
        where = self.moved[index]
        acting = np.flatnonzero(amounts)
        if len(acting) and len(where):
            meshes[np.ix_(acting, where)] += amounts[acting, None, None] * self.offsets[index]


@dataclass(frozen=True, eq=False)
class Head:
    """The template mesh with its displacements and regions: V vertices; regions of triangles have the shape (T, 3)."""

    template: Floats  # (V, 3)
    grown: Floats  # (2, 2, 3, 3, V, 3): man or woman, young or old, thin to heavy, African, Asian, European
    shapes: Morphs  # local shapes of identity, two ends per name: "name+", "name-"
    shape_names: tuple[str, ...]  # (139) those of the pairs; "l-" and "r-" for the sides
    shape_regions: tuple[str, ...]  # (139) part of the face
    outlines: Morphs  # shapes of the whole face
    actions: Morphs  # facial actions, by ARKit's names
    body: Ints
    eyes: tuple[Ints, Ints]  # the person's left and right
    teeth: Ints
    tongue: Ints
    hair: Ints  # curtain of long hair
    lashes: Ints
    kind: Ints  # (V,) SKIN, EYE, ...
    lips: Floats  # (V,) 0..1
    ears: Floats
    mouth: Floats  # inside of the mouth
    openness: Floats  # (V,) share of the sky that each vertex of the template sees, 0..1

    @functools.cached_property
    def surface(self) -> Ints:
        """Triangles of skin and eyes."""
        return np.concatenate([self.body, *self.eyes])

    @functools.cached_property
    def everything(self) -> Ints:
        """Triangles of all parts except the lashes."""
        return np.concatenate([self.surface, self.hair, self.teeth, self.tongue])

    @functools.cached_property
    def eye_vertices(self) -> tuple[Ints, Ints]:
        """Indices of the vertices of the person's left and right eye."""
        left, right = (np.unique(part) for part in self.eyes)
        return left, right

    @functools.cached_property
    def eye_centers(self) -> Floats:
        """Centers (2, 3) of the template's eyes: the person's left and right."""
        return np.stack([self.template[part].mean(0) for part in self.eye_vertices])

    @functools.cached_property
    def skull(self) -> Ints:
        """Indices of the vertices of the head without the neck. The box of a face is their bounding box."""
        return np.unique(self.body[(self.template[self.body][:, :, 1] > 6.25).all(1)])

    @functools.cached_property
    def landmark_vertices(self) -> tuple[int, int, int]:
        """Vertex indices of the tip of the nose and the left and right corner of the mouth, as seen in a frontal picture."""
        return self.nearest(0, 6.94, 1.69), self.nearest(-0.27, 6.62, 1.4), self.nearest(0.27, 6.62, 1.4)

    @functools.cached_property
    def follows(self) -> Floats:
        """(V,) share of the head's rotation that a vertex follows: 1 on the head, 0 at the shoulders."""
        share = smoothstep(5.35, 6.55, self.template[:, 1])
        hair = np.unique(self.hair)
        share[hair] = smoothstep(4.6, 6.4, self.template[hair, 1])
        return share

    def nearest(self, x: float, y: float, z: float) -> int:
        """Return the index of the skin vertex nearest to a point of the template."""
        away = ((self.template - np.array([x, y, z], np.float32)) ** 2).sum(1)
        return int(np.argmin(np.where(self.kind == SKIN, away, np.inf)))

    def skin_where(self, chosen: np.ndarray) -> Ints:
        """Return the triangles (T, 3) of the outer skin with a vertex in the mask `chosen` (V,)."""
        inside = (self.mouth > 0.5) & (self.template[:, 1] > 6.2)
        usable = ~inside[self.body].any(1) & ~(self.ears > 0.5)[self.body].any(1)
        return self.body[usable & chosen[self.body].any(1)]


@functools.cache
def load_head() -> Head:
    """Load the head from the assets. The result is cached."""
    with np.load(ASSET, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    template = _lengths(stored["template"])
    parts = {name[5:]: stored[name].astype(np.int32) for name in stored if name.startswith("part_")}
    kind = np.full(len(template), SKIN, np.int32)
    owners = {
        "left_eye": EYE,
        "right_eye": EYE,
        "upper_teeth": UPPER_TEETH,
        "lower_teeth": LOWER_TEETH,
        "tongue": TONGUE,
    }
    for name, owner in owners.items():
        kind[np.unique(parts[name])] = owner
    names = tuple(str(name) for name in stored["shape_names"])
    ends = [name + end for name in names for end in "+-"]
    displacements = np.stack([stored["shapes_up"], stored["shapes_down"]], 1)
    share = {name: stored[name].astype(np.float32) / 255 for name in ("lips", "ears", "mouth", "openness")}
    return Head(
        template=template,
        grown=_lengths(stored["grown"]),
        shapes=_morphs(ends, displacements.reshape(-1, len(template), 3)),
        shape_names=names,
        shape_regions=tuple(str(region) for region in stored["shape_regions"]),
        outlines=_morphs([str(name) for name in stored["outline_names"]], stored["outlines"]),
        actions=_morphs([str(name) for name in stored["action_names"]], stored["actions"]),
        body=parts["body"],
        eyes=(parts["left_eye"], parts["right_eye"]),
        teeth=np.concatenate([parts["upper_teeth"], parts["lower_teeth"]]),
        tongue=parts["tongue"],
        hair=parts["hair"],
        lashes=parts["lashes"],
        kind=kind,
        **share,
    )


def _lengths(stored: np.ndarray) -> Floats:
    return stored.astype(np.float32) * np.float32(STEP)


def _morphs(names: list[str], stored: np.ndarray) -> Morphs:
    moved = tuple(np.flatnonzero(part.any(1)).astype(np.int32) for part in stored)
    offsets = tuple(_lengths(part[where]) for part, where in zip(stored, moved, strict=True))
    return Morphs(tuple(names), moved, offsets)


# The hairline: template height over the angle around the head, 0° in front, 180° behind.
HAIRLINE_ANGLES = (0, 20, 38, 50, 58, 64, 72, 80, 95, 105, 130, 180)
HAIRLINE_HEIGHTS = (7.96, 7.95, 7.84, 7.66, 7.52, 7.25, 7.2, 7.40, 7.42, 7.0, 6.78, 6.70)
# The upper edge of a full beard, likewise.
BEARD_ANGLES = (0, 14, 22, 45, 62, 75)
BEARD_HEIGHTS = (6.5, 6.6, 6.62, 6.72, 7.15, 7.2)


def angle(places: Floats) -> Floats:
    """Degrees around the head (...), 0 in front and 180 behind, at canonical coordinates (..., 3)."""
    return np.degrees(np.arctan2(np.abs(places[..., 0]), places[..., 2] - np.float32(AXIS)))


def _line(x: Floats, places: tuple[float, ...], heights: tuple[float, ...]) -> Floats:
    return np.interp(x, places, heights).astype(np.float32)


def above_hairline(places: Floats, fringe: float = 0.0, recession: float = 0.0) -> Floats:
    """Height above the hairline (...), in decimetres, at canonical coordinates (..., 3). It is positive where hair grows.

    Args:
        fringe: decimetres by which the front of the hairline is lower.
        recession: 0..1, how far the hairline has receded at the temples.
    """
    theta = angle(places)
    back = 0.3 * np.exp(-(((theta - 38) / 16) ** 2)) + 0.1 * smoothstep(30, 0, theta)
    line = _line(theta, HAIRLINE_ANGLES, HAIRLINE_HEIGHTS) - fringe * smoothstep(62, 45, theta)
    return places[..., 1] - line - recession * back


def inside_beard(places: Floats) -> tuple[Floats, Floats]:
    """Distances (...) inside the area of a full beard and that of a moustache, in decimetres; negative outside."""
    theta, side, y = angle(places), np.abs(places[..., 0]), places[..., 1]
    full = np.minimum(
        _line(theta, BEARD_ANGLES, BEARD_HEIGHTS) - y, (y - 5.98 - 0.2 * smoothstep(0, 60, theta)) * 0.8
    )
    full = np.minimum(full, (72 - theta) / 60)
    lower = y - 6.62 + 0.35 * np.maximum(side - 0.2, 0)
    moustache = np.minimum(np.minimum(6.83 + 0.05 * side - y, lower), 0.36 - side)
    return np.maximum(full, moustache), moustache
