"""Sizes of a build: those of the shipped world, and tiny ones that test the build in a minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCAN = ("--min-side", "64", "--min-face", "24", "--min-sharpness", "0")  # the photos are small
SECOND = "second_training"  # the group for the training of the second recogniser


@dataclass(frozen=True)
class Group:
    """Pictures of a group of people."""

    people: int
    each: int  # pictures per person
    split: str  # group of the people in `SPLITS`
    stream: int  # number of the random stream of the factors, different for each group
    style: str | None = None  # of all pictures; None: any
    accessory: str | None = None
    one_look: bool = False  # all women share a look, and all men another: they differ in shape alone

    @property
    def count(self) -> int:
        return self.people * self.each


@dataclass(frozen=True)
class TrainingSchedule:
    """Length and learning rate of a training. The rate rises at the start, stays constant, and falls to 0 over the last part."""

    steps: int
    batch: int
    rate: float
    fall: float = 0.25  # share of the steps over which the rate falls


@dataclass(frozen=True)
class Settings:
    """The settings of a build. Everything that is built depends on them alone."""

    name: str
    size: int  # pixels along a side of a picture
    groups: Mapping[str, Group]
    schedules: Mapping[str, TrainingSchedule] = field(default_factory=dict)
    judged_prompts: int = 2  # number of prompts that measure how the base model follows them
    own_package: bool = True  # scan with the face package of this build, not with the shipped one
    scan: tuple[str, ...] = ()  # further arguments of `scan`
    training: tuple[str, ...] = ()  # overrides of the settings in the adapters' configuration files
    seed: int = 0


def _groups(
    training: tuple[int, int], second: tuple[int, int], held_out: tuple[int, int], judged: tuple[int, int]
) -> Mapping[str, Group]:
    """Groups of (people, pictures of each): for training, for the second recogniser, for validation and test, and to measure recognition."""
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
    groups=_groups((1080, 10), (900, 10), (128, 8), (64, 8)),
    schedules={
        "readers": TrainingSchedule(1500, 32, 2e-3),
        "recognizer": TrainingSchedule(4000, 32, 2e-3),
        "autoencoder": TrainingSchedule(4000, 16, 1.5e-3),
        "decoder": TrainingSchedule(2000, 16, 1e-3, fall=0.5),
        "second_recognizer": TrainingSchedule(4000, 32, 2e-3),
        "detector": TrainingSchedule(10000, 8, 2e-3),
        "sex_and_age": TrainingSchedule(8000, 32, 2e-3),
        "vision": TrainingSchedule(3000, 64, 1e-3),
        "text": TrainingSchedule(1000, 64, 1e-3),
        "latent_reader": TrainingSchedule(2500, 64, 2e-3, fall=0.6),
        "uniid_start": TrainingSchedule(1000, 64, 1e-3, fall=0.8),
        "base": TrainingSchedule(7400, 64, 1e-3, fall=0.3),
    },
    judged_prompts=240,
    scan=SCAN,
)
TINY = Settings(
    name="tiny",
    size=128,
    groups=_groups((4, 3), (4, 2), (3, 2), (3, 2)),
    schedules={name: TrainingSchedule(2, 2, 1e-3) for name in FULL.schedules},
    own_package=False,  # a detector of two steps finds nobody
    scan=(*SCAN, "--max-bad-share", "1", "--workers", "0"),
    training=(
        "train.steps=2",
        "train.global_batch_size=2",
        "data.workers=0",
        "data.references=2",
        "data.max_bad_share=1.0",
        "output.validate_every=0",
        "output.sample_every=0",
    ),
)
SETTINGS: Mapping[str, Settings] = {settings.name: settings for settings in (FULL, TINY)}
