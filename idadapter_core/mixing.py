"""Combining the faces of one person into one identity input, without training: selection, weights per photo and token
concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from .errors import InputError
from .types import Face, FaceFeatures, Mix, Remark

FULL_EYE_DISTANCE = 60.0  # pixels; larger faces gain nothing, because the networks read them downscaled
OUTLIER_RATIO = 0.5  # relative to the agreement of the others
OUTLIER_GAP = 0.15  # minimum cosine difference, so that noise among small cosines does not count
DOUBTFUL_PAIR = 0.2  # cosine of two photos below which the user gets a warning


@dataclass(frozen=True)
class Outlier:
    """A face that disagrees with the others. Both numbers are cosines of recogniser embeddings, in -1..1."""

    face: int  # index in the features
    agreement: float  # median cosine to the other kept faces
    others: float  # median cosine over all pairs of those


@dataclass(frozen=True)
class _Choice:
    """The selection, by index in the features."""

    weights: tuple[float, ...]  # of every face, as given; 1 by default
    outliers: dict[int, Outlier]
    rejected: frozenset[int]  # the dropped outliers
    chosen: tuple[int, ...]  # in their original order


def select_references(features: FaceFeatures, mix: Mix) -> tuple[FaceFeatures, Tensor]:
    """Select the faces for an identity, and their weights.

    Faces of weight 0 are dropped. So are outliers (see `find_outliers`) if `mix.outliers` is "reject" and no weights are given:
    explicit weights are the user's decision.

    With `mix.references` = N > 0, at most N of the rest are kept. Faces with larger weight come first. Among faces of equal weight
    the one of best quality is taken first, then repeatedly the one with the largest product of quality and distance to the
    nearest face taken so far, to get good and diverse photos. Ties go to the better face, then to the earlier one.

    - quality, 0..1: detector score, times eye distance / 60 px if the eyes are closer than that
    - distance: 1 - cosine of the CLIP class embeddings; without them the distance of the poses given by the landmarks, in eye
      distances, at most 1; without recorded faces all distances are equal, and the order of the photos decides

    Returns:
        the selected features in their original order, and weights (F,) fp32 that sum to 1.

    Raises:
        InputError: no face, or the number of weights differs from the number of faces.
    """
    choice = _choose(features, mix)
    largest = max(
        choice.weights[i] for i in choice.chosen
    )  # normalise to 1, so that weights are in fp32's range
    kept = torch.tensor(
        [choice.weights[i] / largest for i in choice.chosen],
        dtype=torch.float32,
        device=features.embedding.device,
    )
    positive = [
        number for number, weight in enumerate(kept.tolist()) if weight > 0
    ]  # smaller weights are below fp32's range
    kept = kept[positive]
    return features.pick([choice.chosen[number] for number in positive]), kept / kept.sum()


def mean_direction(features: FaceFeatures, mix: Mix) -> Tensor:
    """Return the mean direction (1, 512) of the embeddings of the faces that a mix uses, of length 1, fp32 on the CPU."""
    chosen, weights = select_references(features, mix)
    directions = normalize(chosen.embedding.float(), dim=1)
    return normalize(weighted_mean(directions, weights), dim=1).detach().cpu()


def find_outliers(features: FaceFeatures) -> tuple[Outlier, ...]:
    """Find faces that probably show another person than the rest, in the order of the faces.

    A face's *agreement* is the median of its cosines (recogniser embeddings) to the other faces; `others` is the median of all
    cosines among those. The face with the lowest agreement is an outlier if its agreement is less than half of `others` and more
    than 0.15 below it. It is removed, and the rest is checked again. More than half of the faces always remain: a majority cannot
    disagree with itself.

    The rule is relative because recognisers differ: two photos of the same person have a cosine of 0.3 with one and 0.7 with
    another, and blurred or made-up photos agree less than sharp ones. A fixed threshold would reject good photos with
    one recogniser and accept strangers with the other. If the others do not agree at all (median of 0 or below), there is no
    common person and no outlier.

    Two disagreeing photos do not show which of them is wrong, so fewer than three faces never have outliers. An embedding
    of zeros has the cosine 0 to every other.
    """
    count = len(features)
    cosines = _cosines(features.embedding)
    kept = list(range(count))
    found: list[Outlier] = []
    while 2 * (len(kept) - 1) > count:  # more than half stay, so never one of two is removed
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
    """Explain the decision of `select_references`: a summary with counts, then one remark per face with the reason.

    Photos that may show another person are warnings: outliers, and photos that hardly agree.

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
    """Return the indices of the faces that `select_references` drops, for any reason.

    Raises:
        InputError: as `select_references`.
    """
    chosen = _choose(features, mix).chosen
    return tuple(i for i in range(len(features)) if i not in chosen)


def face_names(features: FaceFeatures) -> list[str]:
    """Return the name of each face for messages: "photo 3" if every photo has one face, else "face 2 (photo 1)"; "face 2" if the
    photos are unknown."""
    photos = [face.image_index + 1 for face in features.faces]
    if not photos:
        return [f"face {i + 1}" for i in range(len(features))]
    if len(set(photos)) == len(photos):
        return [f"photo {photo}" for photo in photos]
    return [f"face {i + 1} (photo {photo})" for i, photo in enumerate(photos)]


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Average over faces: (F, ...) and weights (F,) that sum to 1 -> (1, ...)."""
    return torch.einsum("f,f...->...", weights.to(x.dtype), x)[None]


def concatenate_tokens(tokens: Tensor) -> Tensor:
    """Concatenate the tokens of all faces to one sequence: (F, S, C) -> (1, F * S, C)."""
    return rearrange(tokens, "f s c -> 1 (f s) c")


def token_bias(weights: Tensor, tokens_per_face: int) -> Tensor:
    """Attention bias (F * S,) for concatenated tokens: the log of each face's weight.

    The softmax then distributes attention according to the weights, so one photo given F times equals the photo given once.
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
    present = [i for i in range(count) if weights[i] > 0]  # faces of weight 0 do not count
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
    """Select `limit` of the candidates by weight, quality and diversity, in their original order."""
    qualities = [_quality(face) for face in features.faces] or [1.0] * len(features)
    distances = _distances(features)
    nearest = np.ones(len(features))  # distance to the nearest face taken so far; 1 at the start

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
    """Return the quality of a face in its photo, 0..1 (see `select_references`)."""
    score = min(1.0, max(0.0, face.score))
    if len(face.landmarks) < 2:
        return score
    return score * min(1.0, face.eye_distance / FULL_EYE_DISTANCE)


def _distances(features: FaceFeatures) -> NDArray[np.float64]:
    """Return distances (F, F) between the appearances of the faces. Rounded, so that numerical noise has no effect.

    Recogniser embeddings are not used: they encode the person, so the most distant faces are other people and failed crops.
    Selecting by them would collect outliers.
    """
    if features.class_embedding is not None:
        return np.round(1 - _cosines(features.class_embedding), 6)
    count = len(features)
    distances = np.ones((count, count))  # also for unknown poses
    # At most 1: in a profile view the eyes are close together, so everything else seems far and a poor photo would rank high.
    poses = {i: pose for i, face in enumerate(features.faces) if (pose := _pose(face)) is not None}
    if poses:
        known = list(poses)
        points = np.stack([poses[i] for i in known])
        apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
        distances[np.ix_(known, known)] = np.round(apart, 6).clip(max=1)
    return distances


def _pose(face: Face) -> NDArray[np.float64] | None:
    """Return nose and mouth corners (6,) in the coordinate frame of the eyes, or None if the eyes do not define a frame.

    The origin is halfway between the eyes, x points from the left to the right eye, and the unit is their distance. Position, size
    and roll cancel; head rotation and mouth shape remain.
    """
    if len(face.landmarks) < 5 or face.eye_distance == 0:
        return None
    left, right, *rest = (complex(x, y) for x, y in face.landmarks[:5])
    seen = (np.array(rest) - (left + right) / 2) / (right - left)
    return np.concatenate([seen.real, seen.imag])


def _cosines(x: Tensor) -> NDArray[np.float64]:
    """Return the pairwise cosines (F, F) of the rows of (F, C); 0 for a row of zeros, also with itself."""
    rows = x.detach().cpu().double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(unit @ unit.T, dtype=np.float64)


def _remark_on(i: int, name: str, choice: _Choice, mix: Mix) -> Remark:
    """Explain the decision about one face."""
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
    """Return a warning if faces hardly agree but none is an outlier.

    One against one, or two against two, gives no majority, so no face is dropped. The threshold is absolute because there is no
    reference person: cosines of recognisers are near 0 for two people, and rarely below 0.2 for two photos of one person.
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
