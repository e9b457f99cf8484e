"""Which photos of a person take part: quality, diversity, outliers, and the report that tells of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idadapter_core.errors import InputError
from idadapter_core.mixing import find_outliers, left_out, mix_remarks, select_references
from idadapter_core.types import OUTLIERS, Face, FaceFeatures, Mix
from tests.golden import recipe
from tests.tiny.face_package import MarkedFace
from tests.tiny.features import face_features
from tests.tiny.idadapter import vision_features
from tests.tiny.uniid import TINY_SD15, tiny_adapter

WIDTH = 512


def shown(
    yaw: float = 0.0,
    score: float = 0.9,
    eye_distance: float = 90.0,
    *,
    x: float = 300.0,
    roll: float = 0.0,
    photo: int = 0,
) -> Face:
    """A face as the detector would find it."""
    points = MarkedFace(x, 300, eye_distance, yaw=yaw, roll=roll).landmarks
    landmarks = tuple((float(px), float(py)) for px, py in points)
    size = 2 * eye_distance
    return Face((x - size / 2, 300 - size / 2, x + size / 2, 300 + size / 2), landmarks, score, photo)


def person(*faces: Face, embedding: Tensor | None = None, classes: Tensor | None = None) -> FaceFeatures:
    """These faces, one per photo. Without an embedding all look the same to the recogniser."""
    return FaceFeatures(
        embedding=torch.ones(len(faces), WIDTH) if embedding is None else embedding,
        class_embedding=classes,
        faces=tuple(replace(face, image_index=i) for i, face in enumerate(faces)),
    )


def taken(features: FaceFeatures, references: int = 0, **mix: object) -> list[int]:
    """Indices of the chosen faces."""
    picked, _ = select_references(features, Mix(references=references, **mix))  # type: ignore[arg-type]
    return [face.image_index for face in picked.faces]


def lookalikes(people: str, agreement: float = 0.6) -> Tensor:
    """Embeddings of one photo per letter: `agreement` is the cosine of two photos of one person, 0 that of two people."""
    rows = torch.zeros(len(people), WIDTH)
    for i, letter in enumerate(people):
        rows[i, ord(letter) - ord("A")] = math.sqrt(agreement)
        rows[i, 100 + i] = math.sqrt(1 - agreement)
        rows[i] *= 5 + i  # recognisers do not normalise
    return rows


def photos_of(people: str, agreement: float = 0.6) -> FaceFeatures:
    return person(*[shown()] * len(people), embedding=lookalikes(people, agreement))


def with_cosines(table: Sequence[Sequence[float]]) -> FaceFeatures:
    """Faces whose embeddings have these cosines, given for each pair once: the rows below the diagonal."""
    count = len(table) + 1
    cosines = torch.eye(count, dtype=torch.float64)
    for row, values in enumerate(table, start=1):
        for column, value in enumerate(values):
            cosines[row, column] = cosines[column, row] = value
    return FaceFeatures(embedding=torch.linalg.cholesky(cosines))


def mix_report(features: FaceFeatures, mix: Mix) -> str:
    """All remarks, one line each."""
    return "\n".join(remark.text for remark in mix_remarks(features, mix))


def mix_warnings(features: FaceFeatures, mix: Mix) -> tuple[str, ...]:
    return tuple(remark.text for remark in mix_remarks(features, mix) if remark.is_warning)


def strangers(features: FaceFeatures) -> list[int]:
    return [outlier.face for outlier in find_outliers(features)]


# --- quality and diversity -------------------------------------------------------------------------------------------


def test_the_first_face_is_the_one_of_best_quality() -> None:
    tiny, blurred, good = shown(score=0.99, eye_distance=12), shown(score=0.5), shown(score=0.9)
    assert taken(person(tiny, blurred, good), 1) == [2]
    assert taken(person(good, tiny, blurred), 1) == [0]


def test_beyond_sixty_pixels_between_the_eyes_a_face_is_not_better() -> None:
    assert taken(person(shown(eye_distance=62), shown(eye_distance=400)), 1) == [0]
    assert taken(person(shown(eye_distance=58), shown(eye_distance=62)), 1) == [1]


def test_then_comes_the_face_shown_most_differently() -> None:
    features = person(shown(1, 0.9), shown(0, 0.95), shown(30, 0.85), shown(-10, 0.9))
    assert taken(features, 2) == [1, 2]
    assert taken(features, 3) == [1, 2, 3]
    assert taken(features, 4) == [0, 1, 2, 3]


def test_the_nearest_of_the_faces_taken_counts() -> None:
    """The third face is far from the second and the fourth from the first, but one of them shows nothing new."""
    features = person(shown(0, 0.95), shown(40), shown(-8), shown(39))
    assert taken(features, 3) == [0, 1, 2]
    features = person(shown(0, 0.95), shown(40), shown(3), shown(28))
    assert taken(features, 3) == [0, 1, 3]


def test_a_poor_photo_is_not_taken_because_it_is_different() -> None:
    assert taken(person(shown(0), shown(40, score=0.05), shown(10)), 2) == [0, 2]
    assert taken(person(shown(0), shown(40, eye_distance=3), shown(10)), 2) == [0, 2]


def test_a_profile_whose_eyes_draw_together_is_not_taken_for_its_geometry() -> None:
    profile = replace(
        shown(), landmarks=((300.0, 270.0), (304.0, 270.0), (340.0, 300.0), (310.0, 330.0), (314.0, 330.0))
    )
    assert taken(person(shown(0), profile, shown(25)), 2) == [0, 2]


def test_place_size_and_roll_are_no_difference() -> None:
    features = person(shown(0, 0.95), shown(0, 0.9, 200, x=500, roll=25), shown(4, 0.9))
    assert taken(features, 2) == [0, 2]


def test_what_clip_sees_counts_more_than_the_pose() -> None:
    classes = torch.eye(8)[[0, 1, 0]] * torch.tensor([[1.0], [20.0], [3.0]])
    posed, embedding = (shown(0, 0.95), shown(0), shown(40)), lookalikes("AAB")
    assert taken(person(*posed, embedding=embedding), 2) == [0, 2]
    assert taken(person(*posed, embedding=embedding, classes=classes), 2) == [0, 1]


def test_a_class_embedding_of_zeros_is_no_obstacle() -> None:
    classes = torch.zeros(3, 8)
    classes[0, 0] = 1
    assert taken(person(shown(score=0.95), shown(), shown(), classes=classes), 2) == [0, 1]


def test_who_the_recogniser_sees_does_not_make_a_face_worth_taking() -> None:
    faces = (shown(0, 0.95), shown(2), shown(20))
    for people in ("AAA", "ABA", "AAB"):
        assert taken(person(*faces, embedding=lookalikes(people)), 2) == [0, 2]


def test_larger_weights_come_first_and_the_rest_is_chosen_beside_them() -> None:
    features = person(shown(40, 0.3), shown(38, 0.95), shown(0, 0.8))
    assert taken(features, 1, weights=(2.0, 1.0, 1.0)) == [0]
    assert taken(features, 2, weights=(2.0, 1.0, 1.0)) == [0, 2]
    assert taken(features, 2, weights=(2.0, 1.5, 1.0)) == [0, 1]


def test_the_same_photo_again_is_taken_when_nothing_else_is_left() -> None:
    assert taken(person(shown(), shown(), shown()), 2) == [0, 1]
    assert taken(person(shown(), shown(score=0.5), shown(score=0.8)), 2) == [0, 2]
    assert taken(person(shown(), shown(), shown(20, 0.5)), 2) == [0, 2]
    classes = torch.ones(3, 8) * 0.1
    assert taken(person(shown(), shown(), shown(), classes=classes), 2) == [0, 1]


def test_without_faces_on_record_the_order_decides() -> None:
    features = face_features(1, 4)
    picked, _ = select_references(features, Mix(references=3))
    assert torch.equal(picked.embedding, features.embedding[:3])


def test_faces_without_usable_geometry_do_not_stop_the_choice() -> None:
    same_eyes = replace(shown(), landmarks=((300.0, 300.0),) * 5)
    bare = replace(shown(score=0.5), landmarks=())
    assert taken(person(same_eyes, same_eyes), 1) == [0]
    assert taken(person(same_eyes, bare, shown(score=0.9)), 1) == [2]
    assert taken(person(same_eyes, bare, shown(score=0.9)), 2) == [1, 2]
    assert taken(person(same_eyes, bare, shown(score=0.9), same_eyes), 3) == [0, 1, 2]


# --- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agreement", [0.32, 0.6, 0.95])
@pytest.mark.parametrize("people", ["BAA", "ABA", "AAAB", "AABAA", "AAAAAAB"])
def test_a_stranger_among_photos_of_one_person_is_found(people: str, agreement: float) -> None:
    (found,) = find_outliers(photos_of(people, agreement))
    assert found.face == people.index("B")
    assert found.agreement == pytest.approx(0, abs=1e-6)
    assert found.others == pytest.approx(agreement, abs=1e-6)


@pytest.mark.parametrize("people", ["AAABB", "BABAA", "AAABC", "AAAAABB"])
def test_several_strangers_are_found(people: str) -> None:
    expected = [i for i, letter in enumerate(people) if letter != "A"]
    assert strangers(photos_of(people)) == expected


@pytest.mark.parametrize("people", ["A", "AB", "AA", "AABB", "ABC", "ABCD", "AAABBB", "AAAABBB", "AAAAA"])
def test_without_a_clear_majority_that_agrees_nobody_is_a_stranger(people: str) -> None:
    assert find_outliers(photos_of(people)) == ()


def test_no_faces_have_no_outliers() -> None:
    assert find_outliers(photos_of("A").pick([])) == ()


@pytest.mark.parametrize(
    ("others", "agreement", "is_outlier"),
    [
        (0.6, 0.28, True),
        (0.6, 0.32, False),  # more than half of the others' agreement
        (0.2, 0.04, True),
        (0.2, 0.06, False),  # hardly apart
        (0.9, 0.44, True),
        (-0.1, -0.4, False),  # nobody to differ from
    ],
)
def test_disagreement_is_measured_against_the_others(
    others: float, agreement: float, is_outlier: bool
) -> None:
    assert strangers(with_cosines([[others], [agreement, agreement]])) == ([2] if is_outlier else [])


def test_the_median_forgives_one_bad_pair() -> None:
    """The last photo agrees with all but one of the others."""
    assert strangers(with_cosines([[0.6], [0.6, 0.6], [0.6, 0.6, 0.6], [0.0, 0.6, 0.6, 0.6]])) == []


def test_more_than_half_of_the_faces_stay() -> None:
    """Once the stranger is gone, the third face is as far from the first two; four faces cannot spare a second one."""
    four = [[0.9], [0.3, 0.3], [0.0, 0.0, 0.0]]
    assert strangers(with_cosines(four)) == [3]
    five = [[0.9], [0.9, 0.9], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]]
    assert strangers(with_cosines(five)) == [3, 4]


def test_the_numbers_are_medians_over_the_faces_left_at_the_time() -> None:
    (found,) = find_outliers(with_cosines([[0.5], [0.7, 0.8], [0.1, 0.2, 0.05]]))
    assert found.agreement == pytest.approx(0.1)
    assert found.others == pytest.approx(0.7)


def test_an_embedding_of_zeros_agrees_with_nobody() -> None:
    embedding = lookalikes("AAAA")
    embedding[1] = 0
    (found,) = find_outliers(FaceFeatures(embedding))
    assert (found.face, found.agreement) == (1, 0)
    assert find_outliers(FaceFeatures(torch.zeros(4, WIDTH))) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outliers_are_found_in_every_dtype(dtype: torch.dtype) -> None:
    assert strangers(FaceFeatures(lookalikes("ABA").to(dtype))) == [1]


def test_outliers_are_left_out_only_when_asked_and_without_weights() -> None:
    features = photos_of("AABA")
    assert taken(features) == [0, 1, 2, 3]
    assert taken(features, outliers="keep") == [0, 1, 2, 3]
    assert taken(features, outliers="reject") == [0, 1, 3]
    assert taken(features, outliers="reject", weights=(1.0, 1.0, 1.0, 1.0)) == [0, 1, 2, 3]


def test_an_outlier_is_left_out_before_references_are_chosen() -> None:
    faces = (shown(score=0.6), shown(score=0.5), shown(score=0.99))
    features = person(*faces, embedding=lookalikes("AAB"))
    assert taken(features, 1) == [2]
    assert taken(features, 1, outliers="reject") == [0]
    assert taken(features, 2, outliers="reject") == [0, 1]


def test_the_weights_of_the_rest_sum_to_one() -> None:
    _, weights = select_references(photos_of("AABA"), Mix(outliers="reject"))
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3))


def test_an_identity_without_the_stranger_is_that_of_the_others(tmp_path: Path) -> None:
    adapter = tiny_adapter(TINY_SD15, tmp_path)
    features = replace(face_features(1, 4), embedding=lookalikes("AABA"))
    expected = adapter.encode(features.pick([0, 1, 3]))
    rejected, kept = (adapter.encode(features, Mix(outliers=choice)) for choice in OUTLIERS)
    assert torch.equal(rejected.adapter_tokens, expected.adapter_tokens)
    assert not torch.equal(kept.adapter_tokens, expected.adapter_tokens)


def test_an_unknown_way_with_outliers_is_refused() -> None:
    assert [Mix(outliers=choice).outliers for choice in OUTLIERS] == ["reject", "keep"]
    with pytest.raises(InputError, match="outliers must be one of reject, keep, got 'drop'"):
        Mix(outliers="drop")


# --- report ----------------------------------------------------------------------------------------------------------

NUMBERS = "cosine 0.00; among the others 0.60"


def test_the_report_names_a_photo_that_was_left_out() -> None:
    features = photos_of("AABA")
    stranger = f"photo 3: left out, it disagrees with the others ({NUMBERS}). Probably another person."
    mix = Mix(outliers="reject")
    assert mix_report(features, mix).splitlines() == [
        "used 3 of 4 photos",
        "photo 1: weight 0.333",
        "photo 2: weight 0.333",
        stranger,
        "photo 4: weight 0.333",
    ]
    assert mix_warnings(features, mix) == (stranger,)


@pytest.mark.parametrize(
    ("mix", "weight", "way_out"),
    [
        (Mix(), "0.25", "set outliers to reject"),
        (Mix(weights=(1, 1, 5, 1), outliers="reject"), "0.625", "give it weight 0"),
    ],
)
def test_the_report_names_a_photo_that_disagrees_and_was_kept(mix: Mix, weight: str, way_out: str) -> None:
    kept = (
        f"photo 3: disagrees with the others ({NUMBERS}), kept with weight {weight}. "
        f"Probably another person: {way_out} to leave it out."
    )
    report = mix_report(photos_of("AABA"), mix).splitlines()
    assert report[0] == "used 4 of 4 photos"
    assert report[3] == kept
    assert mix_warnings(photos_of("AABA"), mix) == (kept,)


def test_the_report_says_why_the_rest_was_left_out() -> None:
    features = photos_of("AAAAA")
    mix = Mix(references=2, weights=(0, 1, 1, 1, 3))
    assert mix_report(features, mix).splitlines() == [
        "used 2 of 5 photos",
        "photo 1: left out, its weight is 0",
        "photo 2: weight 0.25",
        "photo 3: left out, no more than 2 are wanted (references)",
        "photo 4: left out, no more than 2 are wanted (references)",
        "photo 5: weight 0.75",
    ]
    assert mix_warnings(features, mix) == ()


def test_a_photo_of_weight_zero_is_no_witness() -> None:
    """Two photos of one person and three of others that the user has set aside: nobody disagrees."""
    features = photos_of("ABBBA")
    assert mix_warnings(features, Mix(weights=(1, 0, 0, 0, 1))) == ()
    (warning,) = mix_warnings(features, Mix(weights=(1, 1, 1, 0, 0)))
    assert warning.startswith("photo 1: disagrees with the others")


@pytest.mark.parametrize(("people", "warned"), [("AB", True), ("AA", False)])
def test_two_photos_that_hardly_agree_are_reported(people: str, warned: bool) -> None:
    features = photos_of(people)
    warnings = mix_warnings(features, Mix(outliers="reject"))
    assert [warning.startswith("the two photos are hardly alike (cosine 0.00;") for warning in warnings] == (
        [True] if warned else []
    )
    assert ("hardly alike" in mix_report(features, Mix())) == warned
    assert taken(features, outliers="reject") == [0, 1]


def test_one_photo_is_reported() -> None:
    assert mix_report(photos_of("A"), Mix()) == "used 1 of 1 photo\nphoto 1: weight 1"


def test_photos_are_named_as_they_stand_in_the_batch() -> None:
    """The second photo of the batch had no face and was skipped."""
    features = photos_of("AAB")
    features = replace(
        features, faces=tuple(replace(face, image_index=2 * i) for i, face in enumerate(features.faces))
    )
    names = [line.partition(":")[0] for line in mix_report(features, Mix()).splitlines()]
    assert names == ["used 3 of 3 photos", "photo 1", "photo 3", "photo 5"]


def test_faces_are_numbered_where_a_photo_gave_several() -> None:
    features = photos_of("AB")
    features = replace(features, faces=(shown(photo=0), shown(photo=0)))
    *lines, pair = mix_report(features, Mix()).splitlines()
    assert lines == [
        "used 2 of 2 faces",
        "face 1 (photo 1): weight 0.5",
        "face 2 (photo 1): weight 0.5",
    ]
    assert pair.startswith("the two faces are hardly alike (cosine 0.00;")
    assert pair.endswith("use faces of one person.")
    assert "face 2: weight 0.5" in mix_report(replace(features, faces=()), Mix())


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_report_tells_what_is_done(outliers: str, references: int, weighted: bool) -> None:
    for seed in range(20):
        values = recipe.value(seed, "faces", (6, 3)).tolist()
        faces = [shown(20 * yaw, min(1, abs(score)), 30 + 30 * abs(size)) for yaw, score, size in values]
        people = "".join("AAAB"[int(abs(7 * score)) % 4] for _, score, _ in values)
        features = person(*faces, embedding=lookalikes(people))
        given = tuple(float(int(abs(3 * yaw)) % 3) for yaw, _, _ in values) if weighted else ()
        mix = Mix(references=references, weights=given if any(given) else (), outliers=outliers)
        picked, weights = select_references(features, mix)
        report = mix_report(features, mix)
        pairs = re.findall(r"photo (\d+): .*?weight (\d[\d.]*\d|\d)", report)
        told = {int(photo) - 1: float(weight) for photo, weight in pairs}
        absent = [int(photo) - 1 for photo in re.findall(r"photo (\d+): left out", report)]
        assert list(left_out(features, mix)) == absent
        assert list(told) == [face.image_index for face in picked.faces]
        assert list(told.values()) == pytest.approx(weights.tolist(), abs=1e-3)
        assert sorted([*told, *absent]) == list(range(6))
        assert set(mix_warnings(features, mix)) <= set(report.splitlines())


def test_the_report_refuses_what_the_choice_refuses() -> None:
    for explain in (mix_report, mix_warnings):
        with pytest.raises(InputError, match="there is no face"):
            explain(photos_of("A").pick([]), Mix())
        with pytest.raises(InputError, match="2 weights were given for 1 face"):
            explain(photos_of("A"), Mix(weights=(1, 1)))


def test_a_weight_below_the_range_of_fp32_is_none() -> None:
    chosen, weights = select_references(vision_features(1, 3), Mix(weights=(1.0, 1e-60, 0.5)))
    assert len(chosen) == 2
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("people", "warned"), [((0, 1, 2), True), ((0, 0, 1, 1), True), ((0, 0, 0), False), ((0, 1), True)]
)
def test_people_of_whom_none_stands_out_are_told(people: tuple[int, ...], warned: bool) -> None:
    """Nobody can be left out where no majority agrees, but the user is told."""
    directions = torch.eye(4)[list(people)]
    noise = recipe.value(0, "photos", (len(people), 4))
    remarks = mix_remarks(FaceFeatures(embedding=directions + 0.05 * noise), Mix())
    said = [remark.text for remark in remarks if remark.is_warning]
    assert len(said) == warned
    assert all("hardly alike" in text for text in said)
