"""Makes posed meshes of people and factors, in batches. Only sums and products are used, so a mesh never depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Floats, normals, rotate, rounded, smoothstep
from .factors import COLLARS, EXPRESSIONS, Factors
from .head import SKIN, load_head
from .identity import LONG_STYLES, Person, base_name, trait_names

HEAD_HEIGHT = 2.36  # decimetres, of the template
OLD, YOUNG = 70.0, 24.0  # years of the two sculpted ages
PIVOT = (0.0, -1.0, -1.0)  # center of rotation in the neck, relative to the point between the eyes
SHOULDERS_FOLLOW = 0.25  # share of the head's yaw
CLOTH = 0.055  # decimetres between body and clothes


@dataclass(frozen=True, eq=False)
class Pose:
    """Rotations of the head and of the shoulders."""

    head: Floats  # (3, 3)
    shoulders: Floats  # (3, 3)

    def __call__(self, points: Floats, follows: Floats | float = 1.0) -> Floats:
        """Rotate points (M, 3). `follows` (M,) blends the rotations: 1 as the head, 0 as the shoulders."""
        share = np.asarray(follows, np.float32)[..., None]
        centered = points - np.array(PIVOT, np.float32)
        turned = rotate(centered, self.head) * share + rotate(centered, self.shoulders) * (1 - share)
        return (turned + np.array(PIVOT, np.float32)).astype(np.float32)


def rest_meshes(people: Sequence[Person]) -> Floats:
    """Return the meshes (N, V, 3) of people with neutral faces, in decimetres. The origin lies between the eyes."""
    head = load_head()
    meshes = np.repeat(head.template[None], len(people), 0)
    for grown, amounts in _growth(people):
        meshes += amounts[:, None, None] * grown
    values = np.array([person.shape for person in people], np.float32)
    column = {name: k for k, name in enumerate(trait_names())}
    sides = np.array([person.asymmetry for person in people], np.float32)
    for k, name in enumerate(head.shape_names):
        amount = values[:, column[base_name(name)]] + sides[:, k]
        head.shapes.add(meshes, 2 * k, np.maximum(amount, 0))
        head.shapes.add(meshes, 2 * k + 1, np.maximum(-amount, 0))
    outlines = np.maximum(values[:, [column[name] for name in head.outlines.names]], 0)
    outlines = (
        outlines / np.maximum(_row_sums(outlines), 1)[:, None]
    )  # their sum is at most one at full strength
    for k in range(len(head.outlines.names)):
        head.outlines.add(meshes, k, outlines[:, k])
    return _normalized(meshes)


def _row_sums(values: Floats) -> Floats:
    total = np.zeros(len(values), np.float32)
    for part in values.T:
        total = total + part
    return total


def _growth(people: Sequence[Person]) -> list[tuple[Floats, Floats]]:
    """Return the sculpted bodies (V, 3), each with its weights (N,) for the people."""
    head = load_head()
    found = []
    for sex in range(2):  # the file has men first
        for age in range(2):
            for weight in range(3):
                for origin in range(3):
                    amounts = np.array(
                        [_share(p, sex, age, weight) * p.ancestry[origin] for p in people], np.float32
                    )
                    if amounts.any():
                        found.append((head.grown[sex, age, weight, origin], amounts))
    return found


def _share(person: Person, sex: int, age: int, weight: int) -> float:
    old = min(max((person.age - YOUNG) / (OLD - YOUNG), 0), 1) * (0.7 if person.sex == "woman" else 0.85)
    same_sex = (person.sex == "woman") == (sex == 1)
    return same_sex * (old if age else 1 - old) * max(1 - abs(2 * person.weight - weight), 0)


def _normalized(meshes: Floats) -> Floats:
    """Move the origin between the eyes, and scale all heads to nearly the same height."""
    head = load_head()
    left, right = head.eye_vertices
    center = (meshes[:, left].mean(1) + meshes[:, right].mean(1)) / 2
    meshes = meshes - center[:, None]
    heights = meshes[:, head.skull, 1]
    scale = rounded((HEAD_HEIGHT / (heights.max(1) - heights.min(1))) ** np.float32(0.8))
    return meshes * scale[:, None, None]


def posed_meshes(
    rest: Floats, people: Sequence[Person], factors: Sequence[Factors]
) -> tuple[Floats, Floats, list[Pose]]:
    """Return meshes (N, V, 3) with expression, clothes and rotation, the same meshes before the rotation, and the N rotations."""
    head = load_head()
    still = rest.copy()
    for name, amounts in _muscles(factors).items():
        head.actions.add(still, head.actions.names.index(name), amounts)
    offset = normals(still, head.surface)
    for k, factor in enumerate(factors):
        inside = CLOTH * smoothstep(0.02, -0.06, above_neckline(head.template, factor.collar))
        worn = inside * (head.kind == SKIN) * (head.template[:, 1] < 6.3)
        still[k] += offset[k] * worn[:, None]
        if people[k].look.hair.style in LONG_STYLES:
            _comb(still[k], people[k])
    poses = [_pose(factor) for factor in factors]
    turned = np.stack([pose(mesh, head.follows) for pose, mesh in zip(poses, still, strict=True)])
    return turned, still, poses


def _comb(mesh: Floats, person: Person) -> None:
    """Move the curtain of long hair closer to the neck, and wavy hair into waves, in place."""
    head = load_head()
    curtain = np.unique(head.hair)
    places = head.template[curtain]
    mesh[curtain, 0] *= 0.98 - 0.10 * smoothstep(6.7, 6.0, places[:, 1])
    if person.look.hair.style == "wavy":
        side = np.sign(places[:, 0])
        wave = rounded(np.sin(places[:, 1] * 6.5 + 1.5 * side + 2 * places[:, 2]))
        mesh[curtain, 0] += side * (0.10 + 0.07 * wave) * smoothstep(7.4, 6.6, places[:, 1])


def _muscles(factors: Sequence[Factors]) -> dict[str, Floats]:
    """Return the amounts (N,) of each facial action that occurs in one of the pictures, by name."""
    names = load_head().actions.names
    amounts: dict[str, Floats] = {}

    def move(row: int, name: str, amount: float) -> None:
        for full in [name] if name in names else [f"{name}Left", f"{name}Right"]:
            amounts.setdefault(full, np.zeros(len(factors), np.float32))[row] += amount

    for row, factor in enumerate(factors):
        for name, amount in EXPRESSIONS[factor.expression].items():
            move(row, name, amount if name == "eyeBlink" else amount * factor.strength)
        if factor.expression == "eyes_closed":
            continue
        right, up = factor.gaze
        inward, outward = (
            ("eyeLookInRight", "eyeLookOutLeft") if right > 0 else ("eyeLookInLeft", "eyeLookOutRight")
        )
        move(row, inward, abs(right))
        move(row, outward, abs(right))
        move(row, "eyeLookUp" if up > 0 else "eyeLookDown", 0.7 * abs(up))
    # The same order in all batches: sums of floats depend on it.
    return {name: amounts[name] for name in sorted(amounts)}


def _pose(factor: Factors) -> Pose:
    yaw, pitch, roll = (float(np.radians(value)) for value in (factor.yaw, factor.pitch, factor.roll))
    tilt = _matrix(2, roll) @ _matrix(0, pitch)
    return Pose(rounded(tilt @ _matrix(1, yaw)), rounded(_matrix(1, SHOULDERS_FOLLOW * yaw)))


def _matrix(axis: int, angle: float) -> np.ndarray:
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[b, a] = np.sin(angle)
    matrix[a, b] = -np.sin(angle)
    return matrix


def above_neckline(places: Floats, collar: str) -> Floats:
    """Height above the edge of the clothes (...), in decimetres, at canonical coordinates (..., 3). It is negative under the clothes."""
    deeper = dict(zip(COLLARS, (0.0, 0.12, 0.05, -0.16), strict=True))[collar]
    x, y, z = places[..., 0], places[..., 1], places[..., 2]
    edge = 5.60 + 0.55 * (np.sqrt(x * x + (z - 0.1) ** 2) - 0.55) - deeper * smoothstep(-0.1, 0.6, z)
    if collar == "v":
        edge = edge - 0.9 * np.maximum(0.42 - np.abs(x), 0) * smoothstep(0.1, 0.3, z)
    return y - edge
