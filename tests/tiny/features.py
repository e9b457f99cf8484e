"""Made-up face features: random, reproducible, of the shapes a torch iResNet gives."""

from __future__ import annotations

from collections.abc import Sequence

from idadapter_core.faces.iresnet import STAGE_WIDTHS
from idadapter_core.methods.uniid.encoder import STAGE_SIDES
from idadapter_core.types import Face, FaceFeatures
from tests.golden import recipe

RECOGNIZER = "0123456789abcdef"


def face(score: float = 0.9, sex: str | None = None) -> Face:
    """A face with plausible geometry."""
    landmarks = ((40.0, 50.0), (70.0, 50.0), (55.0, 65.0), (45.0, 80.0), (65.0, 80.0))
    return Face(box=(30.0, 30.0, 80.0, 95.0), landmarks=landmarks, score=score, sex=sex)


def face_features(
    seed: int, count: int = 1, faces: Sequence[Face] = (), recognizer: str = RECOGNIZER
) -> FaceFeatures:
    """`count` faces whose values stand in the golden recipe under the names of the golden files."""
    return FaceFeatures(
        embedding=recipe.value(seed, "face_embedding", (count, 512)),
        stages=tuple(
            recipe.value(seed, f"face_stage{number}", (count, width, side, side))
            for number, (width, side) in enumerate(zip(STAGE_WIDTHS, STAGE_SIDES, strict=True), start=1)
        ),
        faces=tuple(faces),
        recognizer=recognizer,
    )
