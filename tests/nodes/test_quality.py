"""The quality gate: trained adapters of the demo world draw the person, in ComfyUI, from the files that are shipped.

Everything is real: rendered photos of people whom no network was trained on, the shipped networks, the pack's nodes and ComfyUI's sampler.
Limits leave room for the few people of this test; docs/demo_world.md says what each kind of damage comes to.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from idadapter_core.demo_world.claims.judge import INDEPENDENT, Judge, Likeness
from idadapter_core.demo_world.claims.prompts import PROMPTS, Prompt, followed
from idadapter_core.demo_world.claims.subjects import make_subjects
from idadapter_core.demo_world.shipped import METHODS
from tests.harness.demo_scene import Pixels, demo_scene

PEOPLE, SEEDS = 6, 2
ASKED = (
    PROMPTS[1],
    PROMPTS[3],
    PROMPTS[4],
)  # they name expressions, directions, backgrounds, clothes and accessories
SILENT = PROMPTS[0]  # names neither expression nor direction
SILENT_SEEDS = 8


class Measured:
    """Pictures of all cases, and what they show. A case is base, METHOD_COUNT, or METHOD_COUNT_rescaled, with COUNT photos."""

    def __init__(self) -> None:
        self.scene = demo_scene()
        self.subjects = make_subjects(PEOPLE)
        self.judge = Judge.open()
        self._own = Likeness.of(self.judge, self.subjects).own[INDEPENDENT]

    @functools.cache  # noqa: B019 - as long as the module's fixture
    def features(self, number: int, count: int) -> Any:
        return self.scene.features(self.subjects[number].references[:count])

    def draw(self, case: str, number: int, prompt: Prompt, seeds: int) -> Pixels:
        """Pictures (seeds, 128, 128, 3) of a person."""
        scene, sex = self.scene, self.subjects[number].person.sex
        if case == "base":
            return scene.draw(scene.model, scene.prompt(prompt.about(sex)), 50 + number, batch=seeds)
        method, count, *rest = case.split("_")
        identity = scene.identity(method, self.features(number, int(count)))
        model = scene.applied(method, identity, rescaled=bool(rest))
        return scene.draw(model, scene.prompt(prompt.text, identity, sex), 50 + number, batch=seeds)

    @functools.cache  # noqa: B019
    def of(self, case: str) -> tuple[float, float]:
        """Mean likeness (a picture without a face is like nobody), and the share of the prompts that is followed."""
        likeness: list[float] = []
        accuracy: list[float] = []
        for number in range(PEOPLE):
            for prompt in ASKED:
                pictures = self.draw(case, number, prompt, SEEDS)
                landmarks, read = self.judge.landmarks(pictures), self.judge.read(pictures)
                own = self._own[number : number + 1]
                found = self.judge.likenesses(pictures, landmarks, INDEPENDENT, own)
                likeness += [0.0 if value is None else value[0] for value in found]
                accuracy += [followed(prompt.classes, seen) for seen in read]
        return float(np.mean(likeness)), float(np.mean(accuracy))

    @functools.cache  # noqa: B019
    def expression_diversity(self, case: str) -> float:
        """Share of pictures that show another expression than the first photo, where the prompt names none."""
        shown: list[bool] = []
        for number, subject in enumerate(self.subjects):
            read = self.judge.read(self.draw(case, number, SILENT, SILENT_SEEDS))
            shown += [seen["expression"] != subject.reference_factors[0].expression for seen in read]
        return float(np.mean(shown))


@pytest.fixture(scope="module")
def measured(pack: object) -> Measured:
    return Measured()


@pytest.mark.parametrize(
    ("case", "margin"),
    [("uniid_4_rescaled", 0.3), ("uniid_4", 0.3), ("idadapter_4", 0.15), ("faceid_1", 0.2)],
)
def test_the_person_is_drawn(case: str, margin: float, measured: Measured) -> None:
    assert measured.of(case)[0] > measured.of("base")[0] + margin


def test_rescaling_keeps_the_prompt(measured: Measured) -> None:
    assert measured.of("uniid_4_rescaled")[1] > measured.of("base")[1] - 0.05


@pytest.mark.parametrize("case", ["idadapter_1", "idadapter_4", "uniid_4_rescaled"])
def test_the_photos_expression_does_not_come_back(case: str, measured: Measured) -> None:
    """The base model shows it by chance, in one picture of sixteen. Copies would show it in all."""
    assert measured.expression_diversity(case) > measured.expression_diversity("base") - 0.15


def test_four_photos_are_as_good_as_one(measured: Measured) -> None:
    assert measured.of("idadapter_4")[0] > measured.of("idadapter_1")[0] - 0.05


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_is_the_model_alone(measured: Measured, method: str) -> None:
    scene, subject = measured.scene, measured.subjects[0]
    text = PROMPTS[1].about(subject.person.sex)
    plain = scene.draw(scene.model, scene.prompt(text), 7)
    applied = scene.applied(method, scene.identity(method, measured.features(0, 1)), weight=0.0)
    np.testing.assert_array_equal(scene.draw(applied, scene.prompt(text), 7), plain)
