"""How like pictures are to a person: numbers, words, and the chart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from idadapter_core.errors import InputError
from idadapter_core.likeness import (
    BANDS,
    TYPICAL_AGREEMENT,
    Likeness,
    Person,
    best_of,
    compare,
    mean_of,
    person_in,
    person_of,
    remarks_on,
)
from idadapter_core.likeness_chart import BAR_TOP, COLORS, HEAD, MOST_ROWS, ROW, draw_chart, rows_shown
from idadapter_core.types import Face, FaceFeatures, Identity
from tests.golden import recipe

FRONT = ((40.0, 40.0), (80.0, 40.0), (60.0, 62.0), (44.0, 84.0), (76.0, 84.0))
TURNED = ((44.0, 40.0), (78.0, 40.0), (72.0, 62.0), (48.0, 84.0), (77.0, 84.0))


def face(landmarks: tuple[tuple[float, float], ...] = FRONT) -> Face:
    return Face((20.0, 10.0, 100.0, 110.0), landmarks, 0.9)


def near(direction: Tensor, cosine: float, seed: int) -> Tensor:
    """A direction at this cosine to another."""
    noise = recipe.value(seed, "noise", direction.shape)
    aside = normalize(noise - (noise @ direction) * direction, dim=0)
    return cosine * direction + (1 - cosine**2) ** 0.5 * aside


AXIS = normalize(recipe.value(0, "axis", (512,)), dim=0)


def photos(*cosines: float, faces: tuple[Face, ...] = ()) -> FaceFeatures:
    rows = [near(AXIS, cosine, seed) * (seed + 2) for seed, cosine in enumerate(cosines)]  # of any length
    return FaceFeatures(torch.stack(rows), faces=faces or tuple(face() for _ in rows), recognizer="net")


def test_the_yardstick_is_what_another_photo_comes_to() -> None:
    """Photos are the person's axis and noise; the mean of many is nearly the axis."""
    cosine = 0.8
    for count in (2, 4, 60):
        person = person_in(photos(*[cosine] * count))
        assert person.agreement == pytest.approx(cosine**2, abs=0.06)
        another = near(AXIS, cosine, 1000)
        assert person.expected == pytest.approx(float(another @ person.direction), abs=0.06)


def test_one_photo_is_judged_by_the_typical_agreement() -> None:
    person = person_in(photos(0.8))
    assert person.is_typical
    assert person.expected == TYPICAL_AGREEMENT
    assert any("rough" in remark.text for remark in remarks_on(person, [Likeness(1, 0.6)]))


def test_copies_of_a_photo_count_once() -> None:
    """Mirrored photos and frames of a video agree by nature, which says nothing of another photo."""
    one = photos(0.8)
    copies = FaceFeatures(
        torch.cat([near(normalize(one.embedding[0], dim=0), 0.97, seed)[None] for seed in range(4)]),
        faces=one.faces * 4,
    )
    person = person_in(copies)
    assert (person.photos, person.is_typical, person.agreement) == (1, True, TYPICAL_AGREEMENT)


def test_a_recogniser_by_which_photos_agree_little_keeps_its_own_scale() -> None:
    person = person_in(photos(0.55, 0.55, 0.55))
    assert not person.is_typical
    assert person.agreement == pytest.approx(0.3, abs=0.08)


def test_photos_of_different_people_are_noticed() -> None:
    person = person_in(photos(0.1, -0.1))
    warned = [remark.text for remark in remarks_on(person, [Likeness(1, 0.6)]) if remark.is_warning]
    assert len(warned) == 1
    assert "are they all of one person?" in warned[0]


def test_the_nearest_of_several_faces_counts() -> None:
    person = person_in(photos(0.9, 0.9, faces=(face(), face(TURNED))))
    group = FaceFeatures(
        torch.stack([near(AXIS, 0.1, 5), near(AXIS, 0.7, 6) * 9, near(AXIS, 0.3, 7)]),
        faces=(face(), face(TURNED), face()),
    )
    found, nearest = compare(person, group)
    assert nearest == 1
    assert found.faces == 3
    expected = float(normalize(group.embedding[1], dim=0) @ person.direction)
    assert found.similarity == pytest.approx(expected)
    assert found.turn == pytest.approx(0, abs=1e-6), "the second photo has that pose"


def test_a_turned_head_is_measured_against_the_nearest_photo() -> None:
    person = person_in(photos(0.9, 0.9))
    picture = FaceFeatures(AXIS[None], faces=(face(TURNED),))
    turn = compare(person, picture)[0].turn
    assert turn is not None
    assert turn > 10


def test_a_picture_without_a_face_counts_zero_and_is_named() -> None:
    person = person_in(photos(0.9, 0.9))
    found = [compare(person, None)[0], Likeness(1, -0.2), Likeness(1, 0.4)]
    assert mean_of(found) == pytest.approx(0.2 / 3)
    assert best_of(found) == 2
    assert best_of(found[:2]) == 1, "a face that is not like the person is still better than none"
    remarks = remarks_on(person, found)
    assert [remark.text for remark in remarks if remark.is_warning] == [
        "1 of 3 pictures show no face that the detector finds; they count 0 in the average."
    ]
    assert remarks[-3].text == "picture 1: no face found."


@pytest.mark.parametrize(("count", "said"), [(1, "the picture shows no face"), (3, "none of the 3 pictures")])
def test_no_face_at_all_is_one_warning(count: int, said: str) -> None:
    (remark,) = remarks_on(person_in(photos(0.9, 0.9)), [Likeness(0)] * count)
    assert remark.is_warning
    assert remark.text.startswith(said)


def test_bands_follow_the_photos_agreement() -> None:
    for person in (person_in(photos(0.9, 0.9)), person_in(photos(0.7, 0.7, 0.7))):
        edges = [least * person.expected for least, _ in BANDS[:-1]]
        assert [person.band(edge + 1e-6) for edge in edges] == [0, 1, 2]
        assert [person.band(edge - 1e-6) for edge in edges] == [1, 2, 3]
        assert person.words(-1.0) == "somebody else"


def test_an_identity_is_compared_by_its_embedding() -> None:
    identity = Identity(None, None, recognizer="net", embedding=AXIS[None])
    person = person_of(identity)
    assert compare(person, FaceFeatures(AXIS[None] * 3, faces=(face(),)))[0] == Likeness(
        1, pytest.approx(1.0)
    )
    with pytest.raises(InputError, match="Make it again from the photos"):
        person_of(replace(identity, embedding=None))


def chart_of(person: Person, *found: Likeness) -> np.ndarray:
    return draw_chart(person, [np.full((30, 60, 3), 90, np.uint8)] * len(found), list(found))


def test_a_chart_has_a_row_for_each_picture_with_a_bar_of_its_length_and_colour() -> None:
    person = person_in(photos(0.9, 0.9))
    low, high = 0.1 * person.expected, 1.0 * person.expected
    chart = chart_of(person, Likeness(1, low), Likeness(1, high), Likeness(0))
    assert chart.dtype == np.uint8

    def bar(row: int, band: int) -> int:
        line = chart[HEAD + ROW * row + BAR_TOP + 4]
        return int((line == COLORS[band]).all(-1).sum())

    assert bar(0, 3) > 10
    assert bar(1, 0) == pytest.approx(10 * bar(0, 3), rel=0.1)
    assert all(bar(2, band) == 0 for band in range(4))


def test_of_many_pictures_the_best_and_the_worst_are_charted() -> None:
    found = [Likeness(1, k / 100) for k in range(40)]
    found[20] = Likeness(0)
    shown = rows_shown(found)
    assert len(shown) == MOST_ROWS
    assert {20, 0, 1} < set(shown)
    assert {39, 38} < set(shown)
    person = person_in(photos(0.9, 0.9))
    assert chart_of(person, *found).shape[0] == chart_of(person, *found[:MOST_ROWS]).shape[0]
