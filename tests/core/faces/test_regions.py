"""Masks of the people in a picture: whose they are, how far they reach, and that they do not overlap."""

from __future__ import annotations

import pytest
import torch

from idadapter_core.errors import FaceError, InputError
from idadapter_core.faces.regions import choose_people, people_masks
from idadapter_core.types import Face

POINTS = ((0.0, 0.0),) * 5


def face(x: float, y: float, side: float) -> Face:
    return Face((x - side / 2, y - side / 2, x + side / 2, y + side / 2), POINTS, 0.9)


def test_the_largest_faces_are_taken_from_left_to_right() -> None:
    small, left, right = face(10, 20, 8), face(40, 20, 20), face(80, 20, 30)
    assert choose_people([right, small, left], 2) == [left, right]
    assert choose_people([right, small, left], 1) == [right]


@pytest.mark.parametrize(("faces", "said"), [(0, "no face was found"), (1, "only 1 face was found")])
def test_fewer_faces_than_people_is_an_error(faces: int, said: str) -> None:
    with pytest.raises(FaceError, match=f"3 people are wanted, and {said}"):
        choose_people([face(30, 30, 20)] * faces, 3)


def test_a_mask_reaches_as_far_as_asked_and_down_twice_as_far() -> None:
    (mask,) = people_masks([face(50, 40, 20)], 120, 100, 0.5)
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1]) + 1) == (20, 70)
    assert (int(columns[0]), int(columns[-1]) + 1) == (30, 70)
    (tight,) = people_masks([face(50, 40, 20)], 120, 100, 0.0)
    assert tight.sum() == 400


def test_masks_do_not_overlap_and_meet_between_the_faces() -> None:
    masks = people_masks([face(30, 40, 20), face(70, 40, 20)], 80, 100, 5)
    assert masks.sum(0).max() == 1
    assert masks.sum() == 80 * 100, "together they cover what both reach"
    assert masks[0, 40, :50].all()
    assert masks[1, 40, 50:].all()


def test_a_large_face_in_front_keeps_more() -> None:
    masks = people_masks([face(30, 40, 10), face(70, 40, 40)], 80, 100, 10)
    border = int(masks[1, 40].nonzero()[0])
    assert border < 40


def test_masks_at_the_edge_stay_inside() -> None:
    masks = people_masks([face(0, 0, 20), face(99, 79, 20)], 80, 100, 1)
    assert masks.shape == (2, 80, 100)
    assert torch.isin(masks, torch.tensor([0.0, 1.0])).all()
    assert (masks.sum((1, 2)) > 0).all()


@pytest.mark.parametrize("grow", [-0.1, 10.1, float("nan")])
def test_a_grow_outside_is_refused(grow: float) -> None:
    with pytest.raises(InputError, match="grow must be"):
        people_masks([face(30, 40, 10)], 80, 100, grow)


def test_every_pixel_that_a_box_reaches_belongs_to_somebody() -> None:
    """At different heights and sizes: an adult and a child, one in front of the other."""
    for faces in ([face(100, 100, 100), face(300, 350, 100)], [face(60, 60, 80), face(120, 160, 30)]):
        together = people_masks(faces, 400, 400, 1)
        alone = torch.cat([people_masks([one], 400, 400, 1) for one in faces])
        torch.testing.assert_close(together.amax(0), alone.amax(0))
        assert together.sum(0).max() == 1
