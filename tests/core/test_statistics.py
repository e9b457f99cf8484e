"""Means with intervals over people, thresholds, and how near a picture is to its reference."""

from __future__ import annotations

import numpy as np
import pytest

from idadapter_core.evaluation.measure import Bands, ObservedPerson, Subject, bands, measure, outside_faces
from idadapter_core.evaluation.observe import Observation
from idadapter_core.evaluation.people import Person
from idadapter_core.evaluation.prompts import Prompt, asked_pose_is_hit
from idadapter_core.statistics import copy_of, estimate, threshold_at


def sample(rng: np.random.Generator, people: int, pictures: int) -> tuple[list[float], list[str]]:
    """Pictures of one person are alike: most of the spread is between people. The true mean is 0.5."""
    centers = rng.normal(0.5, 0.2, people)
    values = (centers[:, None] + rng.normal(0, 0.05, (people, pictures))).ravel()
    return values.tolist(), [f"{person}" for person in range(people) for _ in range(pictures)]


def test_the_interval_holds_the_truth_about_95_times_of_100() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = estimate(*sample(rng, people=25, pictures=8))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.mean < found.high
        held += found.low <= 0.5 <= found.high
    assert 0.88 <= held / 200 <= 0.98


def test_pictures_of_one_person_do_not_narrow_the_interval() -> None:
    values, people = sample(np.random.default_rng(1), people=20, pictures=1)
    few = estimate(values, people)
    many = estimate(values * 50, people * 50)
    assert few is not None
    assert many is not None
    assert many.n == 50 * few.n
    assert (many.mean, many.low, many.high) == pytest.approx((few.mean, few.low, few.high))


def test_values_that_are_not_there_do_not_count() -> None:
    assert estimate([None, None], ["a", "b"]) is None
    alone = estimate([0.4, 0.6, None], ["a", "a", "b"])
    assert alone is not None
    assert (alone.mean, alone.low, alone.high, alone.n) == (pytest.approx(0.5), None, None, 2)


def test_the_threshold_lets_the_wanted_share_pass() -> None:
    impostors = np.random.default_rng(0).normal(0, 0.1, 20_000)
    threshold = threshold_at(impostors)
    assert threshold is not None
    assert (impostors > threshold).mean() == pytest.approx(1e-3, abs=1e-4)
    assert threshold_at(impostors[:999]) is None
    assert threshold_at(impostors[:1000]) is not None


def unit(angle: float) -> np.ndarray:
    return np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], np.float32)


@pytest.mark.parametrize(("angle", "wanted"), [(0, 1), (40, -1), (20, 0), (10, 0.5)])
def test_copying(angle: float, wanted: float) -> None:
    assert copy_of(unit(angle), unit(0), unit(40)) == pytest.approx(wanted, abs=1e-3)


def test_copying_says_nothing_where_the_photos_are_alike() -> None:
    assert copy_of(unit(10), unit(0), unit(0)) is None


def person(name: str, *angles: float) -> ObservedPerson:
    observations = tuple(Observation(10, 10, 1, embedding=unit(angle)) for angle in angles)
    return ObservedPerson(Person(name, "man", (), None), observations, None)


def test_pairs_of_photos_and_verification() -> None:
    found = bands([person("a", 0, 10), person("b", 90, 100), person("c", 180)])
    assert found is not None
    assert len(found.genuine) == 2
    assert len(found.impostors) == 8
    assert min(found.genuine) > max(found.impostors)
    known = Bands((), (), threshold=0.9)
    subject = Subject("run", 1.0, 2, Prompt("plain", "a <class word>"), 0, "p.png", 1.0)
    row = measure(subject, Observation(10, 10, 1, embedding=unit(-20)), person("a", 0, 10), known, None)
    assert row.verified == 0.5  # 20 degrees from one photo, 30 from the other: cosines 0.94 and 0.87
    assert row.id_cos == pytest.approx((np.cos(np.deg2rad(20)) + np.cos(np.deg2rad(30))) / 2)
    assert row.id_cos_max == pytest.approx(np.cos(np.deg2rad(20)))


def test_what_changed_outside_the_faces() -> None:
    base = np.zeros((20, 20, 3), np.uint8)
    image = base.copy()
    image[5:15, 5:15] = 200
    observations = [Observation(20, 20, 1, box=(5, 5, 15, 15)), Observation(20, 20, 0)]
    assert outside_faces(image, base, observations) == 0
    image[0, :] = 255
    assert outside_faces(image, base, observations) == pytest.approx(20 / 300)
    assert outside_faces(image, base, [Observation(20, 20, 1, box=(-3, -3, 30, 30))]) is None


@pytest.mark.parametrize(
    ("asks", "yaw", "pitch", "hit"),
    [
        ("front", 5, 5, True),
        ("front", 20, 0, False),
        ("side", -40, 0, True),
        ("side", 15, 0, False),
        ("left", -20, 0, True),
        ("left", 20, 0, False),
        ("right", 20, 0, True),
        ("up", 0, 15, True),
        ("up", 0, -15, False),
        ("down", 0, -15, True),
    ],
)
def test_asked_poses(asks: str, yaw: float, pitch: float, hit: bool) -> None:
    assert asked_pose_is_hit(asks, yaw, pitch) is hit
