"""What a picture shows: likeness to people by recognisers, and factors by the reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ...errors import FaceError
from ...faces.align import align_face
from ...faces.detector import FaceAnalyzer, open_analyzer
from ...faces.iresnet import IResNet, load_iresnet
from ..build.batches import as_tensor
from ..build.train_recognizers import embeddings_of
from ..readers import Reader, load_reader
from ..second_recognizer import load_second_recognizer
from ..shipped import ASSETS, JUDGE, PACKAGE, READER, RECOGNIZER_FILE
from .outside import OutsideJudge
from .subjects import Pixels, Subject

BATCH = 64
INDEPENDENT, OWN, OUTSIDE = "independent", "own", "outside"
"""Recognisers: trained on other people; the one whose features adapters read; trained on photos of real people."""
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Judge:
    """The networks that judge pictures.

    The second recogniser was trained on other people and has another form than the one whose features adapters read; where it is
    missing, the first one stands in for it, which favours the adapters. The outside judge is there where it is installed.
    """

    analyzer: FaceAnalyzer
    first: IResNet
    second: nn.Module | None
    reader: Reader
    outside: OutsideJudge | None = None

    @classmethod
    def open(cls, files: Path = ASSETS) -> Judge:
        """Open the judges among the shipped files, or among those of a build.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        second = load_second_recognizer(files / JUDGE) if (files / JUDGE).is_file() else None
        first = load_iresnet(files / PACKAGE / RECOGNIZER_FILE, any_layers=True)
        analyzer, reader = open_analyzer(files / PACKAGE, "cpu"), load_reader(files / READER)
        return cls(analyzer, first, second, reader, OutsideJudge.find())

    def read(self, pictures: Pixels) -> list[dict[str, str]]:
        """Return the class of each factor in each of the pictures (N, 128, 128, 3)."""
        found: list[dict[str, str]] = []
        for part in np.array_split(pictures, max(1, -(-len(pictures) // BATCH))):
            read = self.reader.read(as_tensor(part))
            found += [dict(zip(read, classes, strict=True)) for classes in zip(*read.values(), strict=True)]
        return found

    def landmarks(self, pictures: Pixels) -> list[npt.NDArray[np.float32] | None]:
        """Return the five landmarks (5, 2) of the best face of each picture, None where none is found that a recogniser could see."""
        found: list[npt.NDArray[np.float32] | None] = []
        for picture in pictures:
            faces = self.analyzer.detect(picture)
            points = np.asarray(faces[0].landmarks, np.float32) if faces else None
            found.append(points if points is not None and _can_be_aligned(picture, points) else None)
        return found

    def directions(
        self, pictures: Pixels, landmarks: Sequence[npt.NDArray[np.float32] | None], recognizer: str
    ) -> Rows:
        """Embeddings of unit length (N, D) of the faces in pictures, by one of the recognisers; NaN without a face."""
        if recognizer == OUTSIDE:
            assert self.outside is not None
            return self.outside.directions(pictures, landmarks)
        network = self.first if recognizer == OWN else self.second or self.first
        shown = [number for number, points in enumerate(landmarks) if points is not None]
        if not shown:
            return np.full((len(pictures), 1), np.nan, np.float32)
        points = np.array([landmarks[number] for number in shown])
        seen = embeddings_of(network, _embed, pictures[shown], points, BATCH)
        found = np.full((len(pictures), seen.shape[1]), np.nan, np.float32)
        found[shown] = seen / np.linalg.norm(seen, axis=1, keepdims=True)
        return found

    def likenesses(
        self,
        pictures: Pixels,
        landmarks: Sequence[npt.NDArray[np.float32] | None],
        recognizer: str,
        people: Rows,
    ) -> list[list[float] | None]:
        """Cosines of each picture's face to the mean directions of people (P, D); None without a face."""
        directions = self.directions(pictures, landmarks, recognizer)
        return [
            None if points is None else [float(row @ person) for person in people]
            for row, points in zip(directions, landmarks, strict=True)
        ]


def _can_be_aligned(picture: Pixels, points: npt.NDArray[np.float32]) -> bool:
    """Whether enough of the face lies in the picture: a drawn face may be cut off, or no face at all."""
    try:
        align_face(picture, points)
    except FaceError:
        return False
    return True


def _embed(network: nn.Module, crops: Tensor) -> Tensor:
    result = network(crops)
    embedding: Tensor = result[0] if isinstance(result, tuple) else result
    return embedding


@dataclass(frozen=True, eq=False)
class Likeness:
    """The people that pictures are compared with: mean directions (P, D) of their other photos and of their impostors', by recogniser."""

    own: Mapping[str, Rows]
    impostors: Mapping[str, Rows]

    @classmethod
    def of(cls, judge: Judge, subjects: Sequence[Subject]) -> Likeness:
        names = (INDEPENDENT, OWN, *(() if judge.outside is None else (OUTSIDE,)))

        def means(name: str, photos: Callable[[Subject], tuple[Pixels, Rows]]) -> Rows:
            shown = [photos(subject) for subject in subjects]
            return np.stack([_mean(judge.directions(one, list(points), name)) for one, points in shown])

        return cls(
            {name: means(name, lambda subject: (subject.others, subject.other_landmarks)) for name in names},
            {
                name: means(name, lambda subject: (subject.impostor, subject.impostor_landmarks))
                for name in names
            },
        )


def _mean(rows: Rows) -> Rows:
    mean = rows.mean(0)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)
