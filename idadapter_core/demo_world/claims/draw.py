"""Draws and judges the pictures of cases. Results are kept by case, so that an interrupted measurement goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...adapter import Adapter
from ...files import replacing
from ...stable_diffusion.pipeline import ImageRequest, Pipeline
from ...types import FaceFeatures, Identity, Mix
from ..world import CFG, SAMPLER, SIZE, STEPS, World
from .cases import SHORT, Case
from .judge import INDEPENDENT, OUTSIDE, OWN, Judge, Likeness
from .prompts import PROMPTS, Prompt
from .record import Digests, facts_of, is_covered
from .subjects import Pixels, Subject, asked_factors, make_subjects, true_pictures

FORMAT = 3  # of kept results
SHOWN = 8  # people whose pictures of the first seed are kept to look at, after the first reference photo


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    people: int
    seeds: int
    prompts: tuple[Prompt, ...] = PROMPTS
    dtype: str = "float32"  # of the UNet

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers and prompts, in JSON."""
        texts = [prompt.text for prompt in self.prompts]
        drawn = {"steps": STEPS, "cfg": CFG, "sampler": SAMPLER, "dtype": self.dtype}
        return {
            "format": FORMAT,
            "people": self.people,
            "seeds": self.seeds,
            "prompts": texts,
            **drawn,
        }


@dataclass(frozen=True)
class PictureRow:
    """A picture and what it shows.

    likeness: cosine to the mean of the person's other photos, by recogniser (see `judge`); None without a face. impostor: cosine to those
    of another person of the same look. expected: classes that the prompt names. reference: those of the first reference photo.
    """

    person: str
    prompt: int
    seed: int
    likeness: dict[str, float | None]
    impostor: dict[str, float | None]
    read: dict[str, str]
    expected: dict[str, str]
    reference: dict[str, str]


class Measurement:
    """The parts of a measurement: world, judges and people, who are drawn when a case needs them."""

    def __init__(self, world: World, plan: Plan, folder: Path) -> None:
        self.world, self.plan, self.folder = world, plan, folder
        self._digests = Digests(world.files)

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        return tuple(make_subjects(self.plan.people))

    @cached_property
    def judge(self) -> Judge:
        return Judge.open(self.world.files)

    @cached_property
    def _likeness(self) -> Likeness:
        return Likeness.of(self.judge, self.subjects)

    @cached_property
    def _features(self) -> list[FaceFeatures]:
        return [self.world.features(list(subject.references)) for subject in self.subjects]

    def rows(self, case: Case, log: Callable[[str], None]) -> list[PictureRow] | None:
        """Measure a case, or read what was measured before. None where its adapter does not exist."""
        path = self.folder / "cases" / f"{case.name}.json"
        facts = self.plan.facts | self.facts(case)
        if path.is_file():
            content = json.loads(path.read_text("utf-8"))
            if is_covered(facts, content["facts"]):
                return [PictureRow(**row) for row in content["rows"]]
        adapter = self.world.adapter(case.adapter) if case.adapter else None
        if case.adapter and adapter is None:
            log(f"{case.name}: left out, there is no adapter {case.adapter}")
            return None
        rows, shown = self._measure(case, adapter)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path.with_suffix(".npy")) as file, file.open("wb") as stream:
            np.save(stream, shown)
        with replacing(path) as file:
            kept = {"facts": facts, "rows": [asdict(row) for row in rows]}
            file.write_text(json.dumps(kept) + "\n", "utf-8", newline="\n")
        log(f"{case.name}: {len(rows)} pictures")
        return rows

    def facts(self, case: Case) -> dict[str, Any]:
        """What a kept result must have been measured with, besides the plan."""
        judges = {name for seed in range(self.plan.seeds) for name in self._recognizers(case, seed)}
        return facts_of(case, self._digests, judges)

    def _measure(self, case: Case, adapter: Adapter | None) -> tuple[list[PictureRow], Pixels]:
        rows: list[PictureRow] = []
        shown = []
        with contextlib.closing(Pipeline(self.world.base, adapter)) as pipeline:
            for number, subject in enumerate(self.subjects):
                identity = None if adapter is None else adapter.encode(*self._photos(case, number))
                for seed in range(self.plan.seeds):
                    pictures = self._pictures(case, pipeline, subject, identity, number, seed)
                    rows += self._judged(number, seed, pictures, self._recognizers(case, seed))
                    if seed == 0 and number < SHOWN:
                        shown.append(np.concatenate([subject.references[:1], pictures]))
        return rows, np.stack(shown)

    def _photos(self, case: Case, number: int) -> tuple[FaceFeatures, Mix]:
        """The features that a case gives to the adapter, and how they are mixed."""
        mix = Mix(case.mode)
        if not case.stranger:
            return self._features[number].pick(list(range(case.photos))), mix
        stranger = self.subjects[(number + 1) % len(self.subjects)]
        photos = [*self.subjects[number].references[: case.photos - 1], stranger.references[0]]
        return self.world.features(photos), mix

    def _pictures(
        self,
        case: Case,
        pipeline: Pipeline,
        subject: Subject,
        identity: Identity | None,
        number: int,
        seed: int,
    ) -> Pixels:
        prompts = self.plan.prompts
        noise = [1000 * number + 100 * seed + place for place in range(len(prompts))]
        if case.anchor == "copy":
            return np.repeat(subject.references[:1], len(prompts), 0)
        if case.anchor == "true":
            asked = zip(prompts, noise, strict=True)
            return true_pictures(subject, [asked_factors(prompt.classes, start) for prompt, start in asked])
        texts = [prompt.about(subject.person.sex) for prompt in prompts]
        requests = [ImageRequest(text, identity, start) for text, start in zip(texts, noise, strict=True)]
        drawn = pipeline.generate_batch(
            requests,
            steps=STEPS,
            cfg=CFG,
            width=SIZE,
            height=SIZE,
            strengths=case.strengths,
            sampler=SAMPLER,
        )
        return np.asarray((drawn * 255).round().to(torch.uint8).movedim(1, -1).numpy())

    def _recognizers(self, case: Case, seed: int) -> tuple[str, ...]:
        """Names of the recognisers that judge. The outside judge is slow, and judges the main cases' first pictures."""
        is_main = seed == 0 and case in SHORT and self.judge.outside is not None
        return (INDEPENDENT, OWN, OUTSIDE) if is_main else (INDEPENDENT, OWN)

    def _judged(
        self, number: int, seed: int, pictures: Pixels, recognizers: Sequence[str]
    ) -> Iterator[PictureRow]:
        landmarks, read = self.judge.landmarks(pictures), self.judge.read(pictures)
        likeness: list[dict[str, float | None]] = [{} for _ in pictures]
        impostor: list[dict[str, float | None]] = [{} for _ in pictures]
        for name in recognizers:
            both = np.stack([self._likeness.own[name][number], self._likeness.impostors[name][number]])
            for place, found in enumerate(self.judge.likenesses(pictures, landmarks, name, both)):
                likeness[place][name], impostor[place][name] = (None, None) if found is None else found
        subject = self.subjects[number]
        factors = subject.reference_factors[0]
        for place, prompt in enumerate(self.plan.prompts):
            yield PictureRow(
                subject.name,
                place,
                seed,
                likeness[place],
                impostor[place],
                read[place],
                {**prompt.classes, "sex": subject.person.sex},
                {name: str(getattr(factors, name)) for name in prompt.silent},
            )
