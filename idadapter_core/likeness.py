"""Compares the faces in pictures with a person: similarity, bands in words, and turn of the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from .errors import InputError
from .faces.pose import estimate_pose
from .mixing import mean_direction
from .types import Face, FaceFeatures, Identity, Mix, Remark

TYPICAL_AGREEMENT = 0.62
"""Mean cosine of two photos of one person, for a single reference: measured by the demo world's recogniser (`benchmarks/likeness_bands.py`)."""
BANDS = (
    (0.95, "as like as another photo"),
    (0.78, "like the person"),
    (0.45, "some likeness"),
    (float("-inf"), "somebody else"),
)
"""Lowest similarity of each band, as a share of what another photo of the person comes to. Of photos of the demo world, 75 % of a person's own lie in
the first band, 95 % of those of look-alikes (same hair, skin, brows) below the second, and 95 % of those of others below the third
(`benchmarks/likeness_bands.py`)."""
UNKNOWN_PHOTOS = 2  # assumed behind an identity
COPIES = 0.9  # cosine from which two photos count as one
STRANGERS = 0.2  # agreement below which photos are probably of several people; with some recognisers one person's agree by .3


@dataclass(frozen=True, eq=False)
class Person:
    """Who pictures are compared with."""

    direction: Tensor  # (512,) mean direction of the photos' embeddings, of length 1
    recognizer: str  # digest of the network behind it
    photos: int  # number of different photos behind it; 0: unknown
    agreement: float  # mean cosine between two of them; with fewer than two photos the typical one
    is_typical: bool  # whether the agreement is not their own
    faces: tuple[Face, ...] = ()

    @property
    def expected(self) -> float:
        """Similarity that another photo comes to: a mean of n directions is nearer to it than one of them, a sqrt(n / (1 + (n - 1) a))."""
        count = self.photos or UNKNOWN_PHOTOS
        return self.agreement * math.sqrt(count / (1 + (count - 1) * self.agreement))

    def band(self, similarity: float) -> int:
        """Index in `BANDS`."""
        return next(k for k, (least, _) in enumerate(BANDS) if similarity >= least * self.expected)

    def words(self, similarity: float) -> str:
        """The band in words."""
        return BANDS[self.band(similarity)][1]


@dataclass(frozen=True)
class Likeness:
    """One picture compared with a person. Without a face, all but `faces` is None.

    similarity: cosine, -1..1, of the face that is most like the person; independent: the same face by another recogniser.
    turn: degrees between its direction and that of the nearest reference photo; None where the reference's faces are not known.
    """

    faces: int
    similarity: float | None = None
    independent: float | None = None
    turn: float | None = None

    def or_else(self, otherwise: float) -> float:
        """The similarity, or another number for a picture without a face."""
        return otherwise if self.similarity is None else self.similarity


def person_in(features: FaceFeatures) -> Person:
    """Return the person of some photos."""
    directions = normalize(features.embedding.float(), dim=1)
    agreement, photos = _agreement(directions)
    is_typical = photos < 2 or agreement < STRANGERS
    return Person(
        mean_direction(features, Mix())[0],
        features.recognizer,
        photos,
        TYPICAL_AGREEMENT if is_typical else agreement,
        is_typical,
        features.faces,
    )


def _agreement(directions: Tensor) -> tuple[float, int]:
    """Mean cosine between photos (F, 512), and their number, without copies: frames of a video, or one photo mirrored, agree by nature."""
    cosines = directions @ directions.t()
    kept: list[int] = []
    for number in range(len(directions)):
        if all(float(cosines[number, other]) < COPIES for other in kept):
            kept.append(number)
    count = len(kept)
    chosen = cosines[kept][:, kept]
    between = float(chosen.sum() - chosen.diagonal().sum()) / (count * (count - 1)) if count > 1 else 0.0
    return between, count


def person_of(identity: Identity) -> Person:
    """Return the person of an identity.

    Raises:
        InputError: it holds no embedding.
    """
    if identity.embedding is None:
        raise InputError(
            "this identity was saved before identities kept what pictures are compared with. Make it again from the photos, or wire the "
            "photos' features to `faces`."
        )
    return Person(identity.embedding[0], identity.recognizer, 0, TYPICAL_AGREEMENT, True)


def compare(person: Person, features: FaceFeatures | None) -> tuple[Likeness, int]:
    """Compare the faces of one picture with a person. None: the picture shows no face.

    Returns:
        The likeness, and the index of the face that is most like the person (0 without a face).
    """
    if features is None:
        return Likeness(0), 0
    similarities = normalize(features.embedding.float(), dim=1) @ person.direction
    nearest = int(similarities.argmax())
    turn = _turn(features.faces[nearest], person.faces)
    return Likeness(len(features), float(similarities[nearest]), None, turn), nearest


def best_of(found: Sequence[Likeness]) -> int:
    """Index of the picture that is most like the person; 0 if none shows a face."""
    return max(range(len(found)), key=lambda k: (found[k].or_else(float("-inf")), -k))


def mean_of(found: Sequence[Likeness]) -> float:
    """Mean similarity; a picture without a face counts 0."""
    return sum(one.or_else(0.0) for one in found) / len(found)


def remarks_on(person: Person, found: Sequence[Likeness]) -> list[Remark]:
    """Say how like the pictures are: about all of them, what they are compared with, and about each."""
    best, mean = best_of(found), mean_of(found)
    missed = sum(one.similarity is None for one in found)
    if missed == len(found):
        which = "the picture shows no face" if missed == 1 else f"none of the {missed} pictures shows a face"
        return [Remark(f"{which} that the detector finds, so there is nothing to compare.", is_warning=True)]
    top = found[best].or_else(0.0)
    which = f"best: picture {best + 1} with " if len(found) > 1 else ""
    average = f"; {mean:.2f} on average" if len(found) > 1 else ""
    lines = [Remark(f"{which}similarity {top:.2f}, {person.words(top)}{average}.")]
    if missed:
        lines.append(
            Remark(
                f"{missed} of {len(found)} pictures show no face that the detector finds; they count 0 in the average.",
                is_warning=True,
            )
        )
    return [
        *lines,
        _yardstick(person),
        *_copied(found),
        *(
            Remark(f"picture {k + 1}: {_described(person, one)}.", is_detail=True)
            for k, one in enumerate(found)
        ),
    ]


def _described(person: Person, one: Likeness) -> str:
    if one.similarity is None:
        return "no face found"
    parts = [f"{one.similarity:.2f}, {person.words(one.similarity)}"]
    if one.independent is not None:
        parts.append(f"by the independent recogniser {one.independent:.2f}")
    if one.turn is not None:
        parts.append(f"head turned {one.turn:.0f}° against the nearest photo")
    if one.faces > 1:
        parts.append(f"the most like of {one.faces} faces")
    return "; ".join(parts)


def _copied(found: Sequence[Likeness]) -> list[Remark]:
    turns = [one.turn for one in found if one.turn is not None]
    if not turns:
        return []
    return [
        Remark(
            f"Heads are turned by {np.mean(turns):.0f}° on average against the nearest photo; near 0° in all pictures, the photos' pose would "
            "have been copied."
        )
    ]


def _yardstick(person: Person) -> Remark:
    if not person.is_typical:
        return Remark(
            f"The {person.photos} reference photos agree by {person.agreement:.2f} with one another; another photo would come to about "
            f"{person.expected:.2f}."
        )
    if person.photos > 1:
        return Remark(
            f"The {person.photos} reference photos hardly agree with one another: are they all of one person? The bands are those of "
            "people who do not exist.",
            is_warning=True,
        )
    return Remark(
        f"Two photos of one person agree by about {person.agreement:.2f}, as measured on people who do not exist: the bands are rough. "
        "With two or more different reference photos they go by the photos."
    )


def _turn(face: Face, references: Sequence[Face]) -> float | None:
    if not references:
        return None
    pose = estimate_pose(face.landmarks)
    poses = [estimate_pose(reference.landmarks) for reference in references]
    return min(math.hypot(pose.yaw - other.yaw, pose.pitch - other.pitch) for other in poses)
