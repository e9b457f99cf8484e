"""How large everything is: the world that is shipped, and a tiny one that is made in seconds to test the way there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SECOND = "second_training"  # the group that only the recogniser that judges meets


@dataclass(frozen=True)
class Group:
    """Pictures of a group of people."""

    people: int
    each: int  # pictures of a person
    split: str  # whose people (see `SPLITS`)
    stream: int  # keeps the factors of one group apart from those of another
    style: str | None = None  # of all pictures; any where it is None
    accessory: str | None = None
    one_look: bool = False  # all women have one look and all men another: told apart by shape alone

    @property
    def count(self) -> int:
        return self.people * self.each


@dataclass(frozen=True)
class TrainingSchedule:
    """How long a network is trained. The rate rises at the start, stays, and falls to nothing over the last part."""

    steps: int
    batch: int
    rate: float
    fall: float = 0.25  # share of the steps in which the rate falls


@dataclass(frozen=True)
class Settings:
    """Numbers of a build. Everything that is made depends on these and on `seed` alone."""

    name: str
    size: int  # pixels along a side of a picture
    groups: Mapping[str, Group]
    schedules: Mapping[str, TrainingSchedule] = field(default_factory=dict)
    judged_prompts: int = 2  # to measure how the base model follows words
    seed: int = 0


def _groups(
    training: tuple[int, int], second: tuple[int, int], held_out: tuple[int, int], judged: tuple[int, int]
) -> Mapping[str, Group]:
    """People and pictures of each: to learn from, for those who judge, unseen, and unseen in photos to measure recognition."""
    return {
        "validation": Group(*held_out, "validation", 2),
        "test": Group(*held_out, "test", 3),
        "training": Group(*training, "training", 0),
        "test_photo": Group(*judged, "test", 4, style="photo"),
        "test_shape": Group(*judged, "test", 5, style="photo", accessory="none", one_look=True),
        SECOND: Group(*second, "second_training", 1),
    }


FULL = Settings(
    name="full",
    size=128,
    groups=_groups((1080, 10), (400, 10), (128, 8), (64, 8)),
    schedules={
        "readers": TrainingSchedule(1500, 32, 2e-3),
        "recognizer": TrainingSchedule(1050, 32, 2e-3, fall=0.057),
        "autoencoder": TrainingSchedule(4000, 16, 1.5e-3),
        "second_recognizer": TrainingSchedule(2000, 32, 2e-3),
        "detector": TrainingSchedule(10000, 8, 2e-3),
        "sex_and_age": TrainingSchedule(8000, 32, 2e-3),
        "vision": TrainingSchedule(3000, 64, 1e-3),
        "base": TrainingSchedule(16000, 64, 1e-3),
    },
    judged_prompts=240,
)
TINY = Settings(
    name="tiny",
    size=128,
    groups=_groups((4, 3), (4, 2), (3, 2), (3, 2)),
    schedules={name: TrainingSchedule(2, 2, 1e-3) for name in FULL.schedules},
)
SETTINGS: Mapping[str, Settings] = {settings.name: settings for settings in (FULL, TINY)}
