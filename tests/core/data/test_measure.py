"""Every status is provoked by a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from idadapter_core.data.measure import Limits, Measured, Models, judge, measure
from idadapter_core.data.rows import STATUSES
from idadapter_core.data.sources import ListedPhoto
from idadapter_core.faces.align import align_face
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.people import draw_person

PLAIN = (100, 100, 100)


def person(size: int = 512) -> np.ndarray:
    return draw_person(1, "man", size, np.random.default_rng(0), PLAIN)


PICTURES = {
    "ok": person(),
    "ok, with somebody small behind": synthesize(
        512, 512, [MarkedFace(130, 256, 60), MarkedFace(400, 256, 30)]
    ),
    "too_small": person()[:200],
    "too_small for the face models": person()[:20],
    "no_face": synthesize(300, 300),
    "no_face but a piece of one": synthesize(300, 280, [MarkedFace(150, 128, 190)]),
    "many_faces": synthesize(512, 512, [MarkedFace(130, 256, 60), MarkedFace(400, 256, 50)]),
    "small_face in pixels": synthesize(256, 256, [MarkedFace(128, 128, 20)]),
    "small_face in share": synthesize(1024, 1024, [MarkedFace(512, 512, 32)]),
    "extreme_pose": synthesize(512, 512, [MarkedFace(360, 256, 80, yaw=120)]),
    "blur": cv2.GaussianBlur(person(), (0, 0), 3),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_gets_its_status(name: str, models: Models, tmp_path: Path) -> None:
    Image.fromarray(PICTURES[name]).save(tmp_path / "a.png")
    facts, embedding = measure(ListedPhoto("a.png"), tmp_path, models)
    status, reason = judge(facts, Limits())
    assert status == name.partition(",")[0].partition(" ")[0]
    assert status in STATUSES
    assert bool(reason) == (status != "ok")
    if status == "ok":
        assert embedding is not None


def test_a_file_that_is_no_picture_or_not_there(models: Models, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    for photo in (
        ListedPhoto("a.png"),
        ListedPhoto("absent.png"),
        ListedPhoto("table.jsonl:3", problem="the line is no JSON"),
    ):
        facts, embedding = measure(photo, tmp_path, models)
        status, reason = judge(facts, Limits())
        assert (status, embedding) == ("corrupt", None)
        assert reason
    assert reason == "the line is no JSON"


def test_what_is_found_out_about_a_good_photo(models: Models, tmp_path: Path) -> None:
    face = MarkedFace(240, 260, 80, yaw=20, roll=10, score=0.9, skin=(120, 130, 190))
    photo = synthesize(512, 400, [face])
    Image.fromarray(photo).save(tmp_path / "a.png")
    facts, embedding = measure(ListedPhoto("a.png"), tmp_path, models)
    assert (facts.width, facts.height, facts.faces, facts.sex) == (512, 400, 1, "F")
    assert facts.landmarks is not None
    np.testing.assert_allclose(facts.landmarks, face.landmarks, atol=1)
    assert facts.score == pytest.approx(0.9, abs=0.02)
    assert facts.yaw > 15
    assert facts.box is not None
    x1, y1, x2, y2 = facts.box
    assert facts.face_fraction == pytest.approx((x2 - x1) * (y2 - y1) / (512 * 400), abs=1e-4)
    expected = models.analyzer.embed(align_face(photo, models.analyzer.detect(photo)[0].landmarks))
    assert embedding is not None
    np.testing.assert_array_equal(embedding, expected)


GOOD = Measured(
    sha256="0" * 64, width=512, height=512, faces=1, box=(0, 0, 99, 99), face_fraction=0.1, sharpness=99
)


@pytest.mark.parametrize(
    ("changes", "limits", "status"),
    [
        ({}, {}, "ok"),
        ({"width": 511}, {"min_side": 512}, "too_small"),
        ({"rival": 0.5}, {}, "many_faces"),
        ({"rival": 0.49}, {}, "ok"),
        ({}, {"min_face": 100}, "small_face"),
        ({}, {"min_fraction": 0.2}, "small_face"),
        ({"yaw": -31.0}, {"max_yaw": 30}, "extreme_pose"),
        ({"pitch": 31.0}, {"max_pitch": 30}, "extreme_pose"),
        ({"sharpness": 10.0}, {"min_sharpness": 10.1}, "blur"),
        ({"width": 9, "rival": 1.0, "yaw": 80.0, "sharpness": 0.0}, {}, "too_small"),
    ],
)
def test_limits(changes: dict[str, float], limits: dict[str, float], status: str) -> None:
    assert judge(replace(GOOD, **changes), Limits(**limits))[0] == status
