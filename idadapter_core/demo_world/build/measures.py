"""Measures of how well embeddings separate people."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .batches import Numbers


def likeness(embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Cosines (N, N) between embeddings (N, D)."""
    rows = embeddings.astype(np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows @ rows.T)


def area_under_curve(likenesses: npt.NDArray[np.floating], people: Numbers) -> float:
    """Area under the ROC curve: the probability that two pictures of one person are more similar than two of different people.

    A value of 0.5 is chance.

    Args:
        likenesses: (N, N), symmetric.
        people: number of the person in each picture (N,).
    """
    first, second = np.triu_indices(len(people), 1)
    values, same = likenesses[first, second], people[first] == people[second]
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # equal values share their mean rank
    positive, negative = int(same.sum()), int((~same).sum())
    return float((ranks[same].sum() - positive * (positive + 1) / 2) / (positive * negative))


def rank_one(likenesses: npt.NDArray[np.floating], people: Numbers) -> float:
    """Share of pictures whose most similar other picture shows the same person."""
    others = np.array(likenesses, np.float64)
    np.fill_diagonal(others, -np.inf)
    return float((people[others.argmax(1)] == people).mean())


def recognition(embeddings: npt.NDArray[np.floating], people: Numbers) -> dict[str, float]:
    """Return both measures of embeddings (N, D), rounded."""
    likenesses = likeness(embeddings)
    return {
        "auc": round(area_under_curve(likenesses, people), 4),
        "rank_one": round(rank_one(likenesses, people), 4),
    }
