"""Where the bands of the Identity Report lie: `python -m benchmarks.likeness_bands [PEOPLE]`.

Photos of people of the demo world are compared with the mean of two photos of a person, as the report does: the person's other photos, a
look-alike's (another head with the same hair, skin, brows and eyes), and those of another person of the same sex. Cosines are given as shares of
what another photo is expected to come to (`likeness.Person.expected`). No adapter and no base model takes part.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import torch
from numpy.typing import NDArray

from idadapter_core.demo_world.claims.subjects import Pixels, make_subjects
from idadapter_core.demo_world.shipped import PACKAGE, RECOGNIZER_FILE, face_package, shipped
from idadapter_core.faces.detector import FaceAnalyzer, open_analyzer
from idadapter_core.faces.features import extract_features
from idadapter_core.faces.iresnet import IResNet, load_iresnet
from idadapter_core.likeness import Person

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def directions(photos: Pixels, analyzer: FaceAnalyzer, recognizer: IResNet) -> NDArray[np.float32]:
    """Unit embeddings of the photos (N, H, W, 3) in which a face is found."""
    features = extract_features(list(photos), analyzer, recognizer, on_missing="skip").features
    found = torch.nn.functional.normalize(features.embedding, dim=1)
    return np.asarray(found.numpy(), dtype=np.float32)


def main(people: int = 64) -> None:
    """Measure and print."""
    logging.disable(logging.WARNING)
    analyzer = open_analyzer(face_package(), "cpu")
    recognizer = load_iresnet(shipped(f"{PACKAGE}/{RECOGNIZER_FILE}"), any_layers=True)
    subjects = make_subjects(people)
    own = [directions(np.concatenate([s.references[:2], s.others]), analyzer, recognizer) for s in subjects]
    alike = [directions(s.impostor, analyzer, recognizer) for s in subjects]
    agreements, shares = [], {"the person": [], "a look-alike": [], "another person of that sex": []}
    for number, subject in enumerate(subjects):
        pair = own[number][:2]
        agreements.append(float(pair[0] @ pair[1]))
        mean = pair.mean(0) / np.linalg.norm(pair.mean(0))
        other = next(
            k
            for k in (*range(number + 1, people), *range(number))
            if subjects[k].person.sex == subject.person.sex
        )
        for name, photos in zip(shares, (own[number][2:], alike[number], own[other][2:]), strict=True):
            shares[name] += list(photos @ mean)
    agreement = float(np.mean(agreements))
    expected = Person(torch.empty(0), "", 2, agreement, is_typical=False).expected
    print(
        f"{people} people; agreement of two photos of one person: {agreement:.3f}; expected of another photo: {expected:.3f}"
    )
    print("share of that at quantiles " + ", ".join(map(str, QUANTILES)))
    for name, values in shares.items():
        print(f"{name:27} " + "  ".join(f"{x / expected:5.2f}" for x in np.quantile(values, QUANTILES)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
