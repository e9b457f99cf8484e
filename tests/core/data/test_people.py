"""The synthetic people are found, and told apart, with room to spare."""

from __future__ import annotations

from pathlib import Path

import torch

from idadapter_core.data.measure import Limits, Models, judge, measure
from idadapter_core.data.sources import list_photos
from tests.tiny.people import write_people


def test_the_tiny_package_tells_them_apart(models: Models, tmp_path: Path) -> None:
    write_people(tmp_path, people=12, photos=3, seed=3)
    found = [(photo, *measure(photo, tmp_path, models)) for photo in list_photos(tmp_path).photos]
    assert [judge(facts, Limits()) for _, facts, _ in found] == [("ok", "")] * 36
    assert all((facts.sex == "M") == (photo.class_noun == "man") for photo, facts, _ in found)

    directions = torch.nn.functional.normalize(torch.stack([torch.from_numpy(e) for *_, e in found]), dim=1)
    cosines = directions @ directions.T
    person = torch.tensor([int(photo.identity[-2:]) for photo, *_ in found])
    same = person[:, None] == person
    assert cosines[same].min() > 0.85
    assert cosines[~same].max() < 0.45


def test_they_are_the_same_each_time(tmp_path: Path) -> None:
    first = write_people(tmp_path / "a", people=2, photos=2)
    second = write_people(tmp_path / "b", people=2, photos=2)
    other = write_people(tmp_path / "c", people=2, photos=2, seed=1)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert not {path.read_bytes() for path in first} & {path.read_bytes() for path in other}
