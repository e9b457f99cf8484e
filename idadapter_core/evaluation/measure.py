"""Compare images with people, prompts and the base model's images: one row of numbers per image."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np

from ..faces.images import Image
from ..faces.pose import estimate_pose
from ..statistics import copy_of, threshold_at
from .observe import Observation, Vector
from .people import Person
from .prompts import EXPRESSION, POSE, Prompt, asked_pose_is_hit, expression_name

NOT_AVAILABLE = "n/a"
_MOST_PHOTOS = 1000


@dataclass(frozen=True)
class ImageRow:
    """An image and its measurements. None: no value, because a model is missing, nothing was asked or no face was found (see `det_ok`)."""

    run: str
    scale: float | None
    references: int | None  # number of reference photos given to the adapter
    identity: str
    class_word: str
    group: str
    prompt: str
    asks: str
    seed: int | None
    picture: str
    det_ok: bool  # a face was found and could be recognised
    n_faces: int
    face_fraction: float | None
    id_cos: float | None  # first recogniser, mean over the person's reference photos
    id_cos_max: float | None
    id_cos_2: float | None  # second recogniser
    id_cos_2_max: float | None
    # Share of the reference photos that the first recogniser verifies as the same person.
    verified: float | None
    verified_2: float | None
    yaw: float | None  # degrees
    pitch: float | None
    d_yaw: float | None  # absolute difference to the first reference photo
    d_pitch: float | None
    expr: str | None
    expr_changed: bool | None  # differs from the first reference photo
    asked_expr_hit: bool | None  # without a face: not hit
    asked_pose_hit: bool | None
    clip_t: float | None
    clip_t_gain: float | None  # over the base model's picture of the same prompt and seed
    clip_i: float | None  # mean over the person's reference photos
    outside: float | None  # mean absolute difference (0..1) to the base model's image, outside the faces
    copy_geo: float | None
    seconds: float | None


COLUMNS = tuple(entry.name for entry in fields(ImageRow))


@dataclass(frozen=True, eq=False)
class ObservedPerson:
    """A person and the observations of the photos."""

    person: Person
    references: tuple[Observation, ...]
    other: Observation | None


@dataclass(frozen=True, eq=False)
class Bands:
    """A recogniser's cosines of real photos: pairs of one person, and pairs of two people."""

    genuine: Sequence[float]
    impostors: Sequence[float]
    threshold: float | None  # at FAR 1e-3; None with too few pairs


@dataclass(frozen=True, eq=False)
class Subject:
    """An image to measure, with its specification and everything to compare it with."""

    run: str
    scale: float | None
    references: int | None
    prompt: Prompt
    seed: int | None
    picture: str
    seconds: float | None
    text: Vector | None = None  # CLIP's embedding of the prompt
    base: Observation | None = None  # the base model's image of the same prompt and seed
    outside: float | None = None


def bands(people: Sequence[ObservedPerson], part: str = "embedding") -> Bands | None:
    """Cosines of pairs of the people's photos; `part`: embedding or second. None without embeddings.

    Uses all pairs of one person, and pairs of two people among at most 1000 photos (half a million pairs).
    """
    photos: list[tuple[int, Vector]] = []
    genuine: list[float] = []
    for number, seen in enumerate(people):
        observations = (*seen.references, *([seen.other] if seen.other else []))
        own = [vector for observation in observations if (vector := getattr(observation, part)) is not None]
        genuine += [float(a @ b) for a, b in combinations(own, 2)]
        photos += [(number, vector) for vector in own]
    if not photos:
        return None
    some = photos[:: math.ceil(len(photos) / _MOST_PHOTOS)]
    who, vectors = np.array([number for number, _ in some]), np.stack([vector for _, vector in some])
    first, second = np.triu_indices(len(who), k=1)
    impostors = (vectors @ vectors.T)[first, second][who[first] != who[second]].tolist()
    return Bands(genuine, impostors, threshold_at(impostors))


def measure(
    subject: Subject,
    observation: Observation,
    seen: ObservedPerson,
    first: Bands | None,
    second: Bands | None,
) -> ImageRow:
    """Compute the row of an image from `observation`."""
    reference = seen.references[0]
    prompt = subject.prompt
    mean, highest, verified = _cosines(observation.embedding, [r.embedding for r in seen.references], first)
    mean_2, highest_2, verified_2 = _cosines(observation.second, [r.second for r in seen.references], second)
    pose, reference_pose = _pose(observation), _pose(reference)
    clip_t = _cosine(observation.clip, subject.text)
    base_clip_t = None if subject.base is None else _cosine(subject.base.clip, subject.text)
    clip_i = [_cosine(observation.clip, r.clip) for r in seen.references]
    copy = None
    if observation.embedding is not None and reference.embedding is not None:
        if seen.other is not None and seen.other.embedding is not None:
            copy = copy_of(observation.embedding, reference.embedding, seen.other.embedding)
    has_expressions = reference.expression is not None
    return ImageRow(
        run=subject.run,
        scale=subject.scale,
        references=subject.references,
        identity=seen.person.name,
        class_word=seen.person.class_word,
        group=prompt.group,
        prompt=prompt.text,
        asks=prompt.asks,
        seed=subject.seed,
        picture=subject.picture,
        det_ok=observation.has_face,
        n_faces=observation.faces,
        face_fraction=observation.face_fraction,
        id_cos=mean,
        id_cos_max=highest,
        id_cos_2=mean_2,
        id_cos_2_max=highest_2,
        verified=verified,
        verified_2=verified_2,
        yaw=pose[0] if pose else None,
        pitch=pose[1] if pose else None,
        d_yaw=abs(pose[0] - reference_pose[0]) if pose and reference_pose else None,
        d_pitch=abs(pose[1] - reference_pose[1]) if pose and reference_pose else None,
        expr=observation.expression,
        expr_changed=None
        if observation.expression is None
        else observation.expression != reference.expression,
        asked_expr_hit=observation.expression == expression_name(prompt.asks)
        if prompt.group == EXPRESSION and has_expressions
        else None,
        asked_pose_hit=None if prompt.group != POSE else _pose_is_hit(prompt, pose, seen),
        clip_t=clip_t,
        clip_t_gain=None if clip_t is None or base_clip_t is None else clip_t - base_clip_t,
        clip_i=None if None in clip_i else float(np.mean([value for value in clip_i if value is not None])),
        outside=subject.outside,
        copy_geo=copy,
        seconds=subject.seconds,
    )


def _pose_is_hit(prompt: Prompt, pose: tuple[float, float] | None, seen: ObservedPerson) -> bool:
    """Compares the pitch with the person's photos: from five landmarks, it has an offset specific to the person."""
    known = [found[1] for found in map(_pose, seen.references) if found]
    usual = float(np.mean(known)) if known else 0.0
    return pose is not None and asked_pose_is_hit(prompt.asks, pose[0], pose[1] - usual)


def outside_faces(image: Image, base: Image, observations: Sequence[Observation]) -> float | None:
    """Mean absolute difference, 0..1, of two images (H, W, 3) outside the faces' boxes; None if nothing lies outside."""
    kept = np.ones(image.shape[:2], bool)
    for observation in observations:
        if observation.box is not None:
            x1, y1, x2, y2 = (max(round(value), 0) for value in observation.box)
            kept[y1:y2, x1:x2] = False
    if not kept.any():
        return None
    difference = np.abs(image.astype(np.int16) - base.astype(np.int16))
    return float(difference[kept].mean() / 255)


def to_csv(rows: Sequence[ImageRow]) -> str:
    """Render per_image.csv: a header of `COLUMNS`, then one line per row. Booleans are 0 and 1, missing values n/a."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(getattr(row, name)) for name in COLUMNS] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return NOT_AVAILABLE
    if isinstance(value, bool):
        return int(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _cosine(a: Vector | None, b: Vector | None) -> float | None:
    return None if a is None or b is None else float(a @ b)


def _cosines(
    vector: Vector | None, references: Sequence[Vector | None], known: Bands | None
) -> tuple[float | None, float | None, float | None]:
    """Mean and largest cosine to the references, and the share of them that verify."""
    found = [cosine for cosine in (_cosine(vector, r) for r in references) if cosine is not None]
    if not found:
        return None, None, None
    threshold = known.threshold if known else None
    verified = None if threshold is None else float(np.mean([cosine > threshold for cosine in found]))
    return float(np.mean(found)), max(found), verified


def _pose(observation: Observation) -> tuple[float, float] | None:
    """Yaw and pitch of the recognised face, in degrees."""
    if observation.landmarks is None or not observation.has_face:
        return None
    pose = estimate_pose(observation.landmarks)
    return pose.yaw, pose.pitch
