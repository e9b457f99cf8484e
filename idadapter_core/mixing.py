"""How the faces of one person become one identity input, without training: which of them take part, weights per photo and
token concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError
from .types import Face, FaceFeatures, Mix, Remark

FULL_EYE_DISTANCE = 60.0  # pixels; beyond it a face is not better, the networks see it scaled down
OUTLIER_RATIO = 0.5  # of the agreement of the others
OUTLIER_GAP = 0.15  # in cosine, so that noise among small cosines is no reason
DOUBTFUL_PAIR = 0.2  # cosine of two photos below which they should be looked at


@dataclass(frozen=True)
class Outlier:
    """A face that disagrees with the others. Both numbers are cosines of recogniser embeddings, in -1..1."""

    face: int  # its index in the features
    agreement: float  # median over the other faces that were kept
    others: float  # median over all pairs of those


@dataclass(frozen=True)
class _Choice:
    """What was decided, by index in the features."""

    weights: tuple[float, ...]  # of every face, as given; 1 where none were given
    outliers: dict[int, Outlier]
    rejected: frozenset[int]  # the outliers that were left out
    chosen: tuple[int, ...]  # in their original order


def select_references(features: FaceFeatures, mix: Mix) -> tuple[FaceFeatures, Tensor]:
    """The faces that take part and their weights.

    Faces of weight 0 are left out. So are outliers (see `find_outliers`), where `mix.outliers` is "reject" and no weights are
    given: weights are the user's own decision.

    With `mix.references` = N > 0, at most N of the rest remain. Faces of larger weight come first. Among faces of equal weight
    the one of best quality is taken, then again and again the one with the largest product of quality and distance to the
    nearest face taken so far: good photos that show different things. Ties go to the better face, then to the earlier one.

    - quality, 0..1: detector score, times eye distance / 60 px where the eyes are closer than that
    - distance: 1 - cosine of the CLIP class embeddings; without them the distance of the poses that the landmarks show, in eye
      distances, 1 at most; without faces on record all are alike, and the order of the photos decides

    Returns:
        the chosen features in their original order, and weights (F,) fp32 that sum to 1.

    Raises:
        InputError: no face, or as many weights as there are not faces.
    """
    choice = _choose(features, mix)
    largest = max(choice.weights[i] for i in choice.chosen)  # to 1, so that no weight is out of fp32's range
    kept = torch.tensor(
        [choice.weights[i] / largest for i in choice.chosen],
        dtype=torch.float32,
        device=features.embedding.device,
    )
    heard = [
        number for number, weight in enumerate(kept.tolist()) if weight > 0
    ]  # the rest is below fp32's range
    kept = kept[heard]
    return features.pick([choice.chosen[number] for number in heard]), kept / kept.sum()


def find_outliers(features: FaceFeatures) -> tuple[Outlier, ...]:
    """Faces that are probably another person than the rest, in the order of the faces.

    A face's *agreement* is the median of its cosines (recogniser embeddings) to the other faces; `others` is the median of all
    cosines among those. The face of least agreement is an outlier when it has less than half of the agreement that the others
    have among themselves, and more than 0.15 less. It is taken away and the rest is looked at again. More than half of the
    faces always stay: a majority cannot disagree with itself.

    The rule is relative because recognisers differ: what one calls 0.3 for two photos of the same person another calls 0.7,
    and blurred or made-up photos agree less than sharp ones do. A fixed threshold would throw out good photos of one and let
    strangers pass with the other. Where the others do not agree at all (median of 0 or below), there is no person to differ
    from, and no outlier.

    Two photos that disagree cannot tell which of them is wrong, so fewer than three faces never have outliers. An embedding
    of zeros has the cosine 0 to every other.
    """
    count = len(features)
    cosines = _cosines(features.embedding)
    kept = list(range(count))
    found: list[Outlier] = []
    while 2 * (len(kept) - 1) > count:  # more than half stay, which also means: never one of two
        among = cosines[np.ix_(kept, kept)]
        apart = among[~np.eye(len(kept), dtype=bool)].reshape(len(kept), -1)
        agreements = np.median(apart, axis=1)
        worst = int(agreements.argmin())
        rest = np.delete(np.delete(among, worst, axis=0), worst, axis=1)
        agreement = float(agreements[worst])
        others = float(np.median(rest[np.triu_indices(len(rest), k=1)]))
        if others <= 0 or agreement >= OUTLIER_RATIO * others or others - agreement <= OUTLIER_GAP:
            break
        found.append(Outlier(kept.pop(worst), agreement, others))
    return tuple(sorted(found, key=lambda outlier: outlier.face))


def mix_remarks(features: FaceFeatures, mix: Mix) -> tuple[Remark, ...]:
    """What `select_references` does with each face and why, one remark each, after one that counts.

    Warnings are those about photos that may show another person: outliers, and photos that hardly agree.

    Raises:
        InputError: as `select_references`.
    """
    choice = _choose(features, mix)
    names = face_names(features)
    noun, plural = names[0].partition(" ")[0], "s" if len(features) > 1 else ""
    counted = Remark(f"used {len(choice.chosen)} of {len(features)} {noun}{plural}")
    each = [_remark_on(i, name, choice, mix) for i, name in enumerate(names)]
    return (counted, *each, *_doubtful(features, choice, names))


def left_out(features: FaceFeatures, mix: Mix) -> tuple[int, ...]:
    """Indices of the faces that `select_references` leaves out, for whatever reason.

    Raises:
        InputError: as `select_references`.
    """
    chosen = _choose(features, mix).chosen
    return tuple(i for i in range(len(features)) if i not in chosen)


def face_names(features: FaceFeatures) -> list[str]:
    """What messages call each face: "photo 3" where every photo gave one face, else "face 2 (photo 1)"; "face 2" where that is
    not known."""
    photos = [face.image_index + 1 for face in features.faces]
    if not photos:
        return [f"face {i + 1}" for i in range(len(features))]
    if len(set(photos)) == len(photos):
        return [f"photo {photo}" for photo in photos]
    return [f"face {i + 1} (photo {photo})" for i, photo in enumerate(photos)]


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean over faces: (F, ...) and weights (F,) that sum to 1 -> (1, ...)."""
    return torch.einsum("f,f...->...", weights.to(x.dtype), x)[None]


def concatenate_tokens(tokens: Tensor) -> Tensor:
    """Tokens of all faces in one sequence: (F, S, C) -> (1, F * S, C)."""
    return rearrange(tokens, "f s c -> 1 (f s) c")


def token_bias(weights: Tensor, tokens_per_face: int) -> Tensor:
    """Attention bias (F * S,) for concatenated tokens: the log of each face's weight.

    The softmax then shares its attention out by the weights, so that one photo given F times equals that photo given once.
    """
    return weights.log().repeat_interleave(tokens_per_face)


def _choose(features: FaceFeatures, mix: Mix) -> _Choice:
    count = len(features)
    if count == 0:
        raise InputError("there is no face to make an identity from; wire at least one photo with a face")
    if mix.weights and len(mix.weights) != count:
        raise InputError(
            f"{len(mix.weights)} weights were given for {count} face{'s' if count > 1 else ''}; "
            "give one number per face, separated by commas, or leave the field empty"
        )
    weights = mix.weights or (1.0,) * count
    present = [i for i in range(count) if weights[i] > 0]  # a face of weight 0 is no witness either
    outliers = {
        present[found.face]: Outlier(present[found.face], found.agreement, found.others)
        for found in find_outliers(features.pick(present))
    }
    rejected = frozenset(outliers if mix.outliers == "reject" and not mix.weights else ())
    candidates = [i for i in present if i not in rejected]
    limit = mix.references or count
    chosen = candidates if len(candidates) <= limit else _take(features, weights, candidates, limit)
    return _Choice(weights, outliers, rejected, tuple(chosen))


def _take(features: FaceFeatures, weights: tuple[float, ...], candidates: list[int], limit: int) -> list[int]:
    """`limit` of the candidates by weight, quality and diversity, in their original order."""
    qualities = [_quality(face) for face in features.faces] or [1.0] * len(features)
    distances = _distances(features)
    nearest = np.ones(len(features))  # to a face taken so far; 1 while there is none

    def merit(i: int) -> tuple[float, float, float, int]:
        return weights[i], qualities[i] * float(nearest[i]), qualities[i], -i

    taken: list[int] = []
    left = list(candidates)
    while len(taken) < limit:
        best = max(left, key=merit)
        left.remove(best)
        nearest = np.minimum(nearest, distances[best]) if taken else distances[best]
        taken.append(best)
    return sorted(taken)


def _quality(face: Face) -> float:
    """0..1: how well a photo shows the face."""
    score = min(1.0, max(0.0, face.score))
    if len(face.landmarks) < 2:
        return score
    return score * min(1.0, face.eye_distance / FULL_EYE_DISTANCE)


def _distances(features: FaceFeatures) -> NDArray[np.float64]:
    """(F, F): how differently the faces are shown. Rounded, so that noise of the arithmetic decides nothing.

    Never by the recogniser's embedding: it says who somebody is, and the faces farthest apart in it are those of other people
    and failed crops. A choice of the most distant ones would collect outliers.
    """
    if features.class_embedding is not None:
        return np.round(1 - _cosines(features.class_embedding), 6)
    count = len(features)
    distances = np.ones((count, count))  # also where a pose is not known
    # At most 1: in a profile the eyes draw together, all else seems far from them, and a poor photo would look rich.
    poses = {i: pose for i, face in enumerate(features.faces) if (pose := _pose(face)) is not None}
    if poses:
        known = list(poses)
        points = np.stack([poses[i] for i in known])
        apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
        distances[np.ix_(known, known)] = np.round(apart, 6).clip(max=1)
    return distances


def _pose(face: Face) -> NDArray[np.float64] | None:
    """Nose and mouth corners (6,) seen from the eyes, or None where the eyes do not span a frame.

    Origin halfway between the eyes, x from the left to the right one, unit their distance: place, size and roll drop out, what
    is left is where the head turns and what the mouth does.
    """
    if len(face.landmarks) < 5 or face.eye_distance == 0:
        return None
    left, right, *rest = (complex(x, y) for x, y in face.landmarks[:5])
    seen = (np.array(rest) - (left + right) / 2) / (right - left)
    return np.concatenate([seen.real, seen.imag])


def _cosines(x: Tensor) -> NDArray[np.float64]:
    """Cosines of the rows of (F, C) to each other, (F, F); 0 for a row of zeros, also to itself."""
    rows = x.detach().cpu().double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(unit @ unit.T, dtype=np.float64)


def _remark_on(i: int, name: str, choice: _Choice, mix: Mix) -> Remark:
    """What becomes of one face."""
    largest = max(choice.weights)
    total = sum(choice.weights[j] / largest for j in choice.chosen)
    weight = f"weight {choice.weights[i] / largest / total:.3g}"
    disagrees = ""
    if outlier := choice.outliers.get(i):
        numbers = f"cosine {outlier.agreement:.2f}; among the others {outlier.others:.2f}"
        disagrees = f"disagrees with the others ({numbers})"
    if i in choice.rejected:
        return Remark(f"{name}: left out, it {disagrees}. Probably another person.", is_warning=True)
    if choice.weights[i] == 0:
        return Remark(f"{name}: left out, its weight is 0")
    if i not in choice.chosen:
        return Remark(f"{name}: left out, no more than {mix.references} are wanted (references)")
    if disagrees:
        way_out = "give it weight 0" if mix.weights else "set outliers to reject"
        hint = f"Probably another person: {way_out} to leave it out."
        return Remark(f"{name}: {disagrees}, kept with {weight}. {hint}", is_warning=True)
    return Remark(f"{name}: {weight}")


def _doubtful(features: FaceFeatures, choice: _Choice, names: Sequence[str]) -> tuple[Remark, ...]:
    """A warning where faces hardly agree, and none of them stands out.

    Two cannot outvote each other, and neither can two and two, so nobody is left out. The threshold is absolute for want of a
    person to compare with: cosines of recognisers are near 0 for two people, and rarely below 0.2 for two photos of one.
    """
    used = [i for i, weight in enumerate(choice.weights) if weight > 0]
    if len(used) < 2 or choice.outliers:
        return ()
    cosines = _cosines(features.embedding[used])
    pairs = list(zip(*np.triu_indices(len(used), k=1), strict=True))
    found = [float(cosines[pair]) for pair in pairs]
    if np.median(found) >= DOUBTFUL_PAIR:
        return ()
    lowest = int(np.argmin(found))
    one, other = (names[used[i]] for i in pairs[lowest])
    noun = names[0].partition(" ")[0]
    which = (
        f"the two {noun}s are"
        if len(used) == 2
        else f"the {noun}s are of more than one person: {one} and {other} are"
    )
    text = (
        f"{which} hardly alike (cosine {found[lowest]:.2f}; two photos of one person are mostly above {DOUBTFUL_PAIR}). "
        f"Probably two people, and the identity will be a blend of both: use {noun}s of one person."
    )
    return (Remark(text, is_warning=True),)
