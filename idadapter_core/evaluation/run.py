"""Run an evaluation: choose people, generate images, measure them, write the results.

<output.folder>/pictures/, seen/        generated images and their observations, reused by a second run
<output.folder>/config.toml, per_image.csv, summary.json, summary.md, report.html
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import config_toml
from ..data.index import Index
from ..extra import require, versions
from ..faces.images import Image
from ..files import write_file
from ..statistics import FAR
from .config import BASE_MODEL, PASTE, EvaluationConfig, RunEntry
from .generate import Drawing, Generator
from .measure import Bands, ImageRow, ObservedPerson, Subject, bands, measure, outside_faces, to_csv
from .metrics import available
from .observe import Observation, Observer, Vector
from .people import Person, RealPhoto, choose_people
from .prompts import POSE, Prompt
from .report import Pictures as ReportPictures, to_html
from .storage import Arrays, Picture, Pictures, key_of, read_picture
from .summary import Summary, summarise, to_json, to_markdown

log = logging.getLogger(__name__)


def evaluate(
    config: EvaluationConfig, index: Index, generator: Generator, observer: Observer
) -> tuple[Summary, int]:
    """Generate, observe and measure images, and write all files. Images and observations with the same settings are read from disk.

    Returns:
        the result, and the number of newly generated images.

    Raises:
        ConfigError: nobody in the index has enough photos.
        IDAdapterError: errors of the models, and CheckpointError if files cannot be written.
    """
    return _Evaluation(config, index, generator, observer).run()


class _Evaluation:
    def __init__(
        self, config: EvaluationConfig, index: Index, generator: Generator, observer: Observer
    ) -> None:
        self.config, self.generator, self.observer = config, generator, observer
        self.index = index
        self.folder = Path(config.output.folder)
        self.pictures = Pictures(self.folder / "pictures")
        self.seen = Arrays(self.folder / "seen")
        self.generated = 0
        self.prompts = config.all_prompts()
        self.texts: dict[str, Vector] = {}
        self.base: dict[tuple[str, int], tuple[Observation, Picture]] = {}  # by text and seed
        self.people: tuple[ObservedPerson, ...] = ()
        self.bands: tuple[Bands | None, Bands | None] = (None, None)

    def run(self) -> tuple[Summary, int]:
        config = self.config
        write_file(self.folder / "config.toml", config_toml(config).encode())
        chosen = choose_people(self.index, config.data, lambda photo: self._observe_photo(photo).has_face)
        self.people = tuple(map(self._observe_person, chosen))
        self.bands = bands(self.people), bands(self.people, "second")
        rows = [*self._anchors(), *(row for run in config.runs for row in self._of_run(run))]
        summary = self._summary(rows)
        for name, text in (
            ("per_image.csv", to_csv(rows)),
            ("summary.json", to_json(summary)),
            ("summary.md", to_markdown(summary)),
            ("report.html", to_html(summary, config, self._report_pictures())),
        ):
            write_file(self.folder / name, text.encode())
        return summary, self.generated

    # -------------------------------------------------------------------------------------------- looking

    def _observe_photo(self, photo: RealPhoto) -> Observation:
        return self._observe(photo.row.sha256, photo.read)

    def _observe(self, name: str, read: Any) -> Observation:
        key = key_of({"picture": name, "observer": self.observer.key})
        return Observation.of(self.seen.get(key, lambda: self.observer.observe(read()).arrays()))

    def _observe_person(self, person: Person) -> ObservedPerson:
        other = None if person.other is None else self._observe_photo(person.other)
        return ObservedPerson(person, tuple(map(self._observe_photo, person.references)), other)

    def _text(self, prompt: Prompt, person: Person) -> Vector | None:
        if self.observer.clip is None:
            return None
        text = prompt.words(person.class_word)
        if text not in self.texts:
            self.texts[text] = self.observer.clip.of_text(text)
        return self.texts[text]

    # -------------------------------------------------------------------------------------------- drawing

    def _draw(self, drawing: Drawing) -> tuple[Observation, Picture]:
        recipe = self.generator.recipe(drawing)
        picture = self.pictures.get(recipe, lambda: self.generator.generate(drawing), time.perf_counter)
        self.generated += picture.is_new
        return self._observe(picture.key, picture.read), picture

    def _base(self, prompt: Prompt, person: Person, seed: int) -> tuple[Observation, Picture]:
        """The base model knows no identities: people with the same noun share its images."""
        key = (prompt.words(person.class_word), seed)
        if key not in self.base:
            self.base[key] = self._draw(Drawing(None, 0.0, person, prompt, seed))
        return self.base[key]

    def _anchors(self) -> Iterator[ImageRow]:
        seeds = self.config.sampling.seeds
        for seen in _progress(self.people, BASE_MODEL):
            for prompt in self.prompts:
                for seed in seeds:
                    observation, picture = self._base(prompt, seen.person, seed)
                    subject = Subject(
                        run=BASE_MODEL,
                        scale=None,
                        references=None,
                        prompt=prompt,
                        seed=seed,
                        picture=self._name(picture),
                        seconds=picture.seconds,
                        text=self._text(prompt, seen.person),
                        base=observation,
                    )
                    yield measure(subject, observation, seen, *self.bands)
        for seen in self.people:
            photo = seen.person.references[0]
            for prompt in self.prompts:
                subject = Subject(
                    run=PASTE,
                    scale=None,
                    references=1,
                    prompt=prompt,
                    seed=None,
                    picture=photo.row.source,
                    seconds=None,
                    text=self._text(prompt, seen.person),
                    base=self._base(prompt, seen.person, seeds[0])[0],
                )
                yield measure(subject, seen.references[0], seen, *self.bands)

    def _of_run(self, run: RunEntry) -> Iterator[ImageRow]:
        for seen in _progress(self.people, run.name):
            for scale in run.scales:
                for prompt in self.prompts:
                    for seed in self.config.sampling.seeds:
                        yield self._row(Drawing(run, scale, seen.person, prompt, seed), seen)

    def _row(self, drawing: Drawing, seen: ObservedPerson) -> ImageRow:
        assert drawing.run is not None
        observation, picture = self._draw(drawing)
        base_observation, base_picture = self._base(drawing.prompt, drawing.person, drawing.seed)
        subject = Subject(
            run=drawing.run.name,
            scale=drawing.scale,
            references=len(drawing.references),
            prompt=drawing.prompt,
            seed=drawing.seed,
            picture=self._name(picture),
            seconds=picture.seconds,
            text=self._text(drawing.prompt, drawing.person),
            base=base_observation,
            outside=outside_faces(picture.read(), base_picture.read(), (observation, base_observation)),
        )
        return measure(subject, observation, seen, *self.bands)

    def _name(self, picture: Picture) -> str:
        return picture.path.relative_to(self.folder).as_posix()

    # -------------------------------------------------------------------------------------------- telling

    def _summary(self, rows: list[ImageRow]) -> Summary:
        first, second = self.bands
        assert first is not None  # people were chosen by the faces in their photos
        verifies = first.threshold is not None, second is not None and second.threshold is not None
        return summarise(
            self.config,
            rows,
            people=len(self.people),
            available=available(self.config, verifies),
            bands=first,
            second_bands=second,
            notes=self._notes(first),
            facts=self._facts(),
        )

    def _notes(self, first: Bands) -> list[str]:
        notes = []
        for setting, given, missing in (
            ("metrics.second", self.config.metrics.second, "likeness is measured by one recogniser only"),
            ("metrics.clip", self.config.metrics.clip, "CLIP-T and CLIP-I are n/a"),
            ("expression.path", self.config.expression.path, "expressions are n/a"),
        ):
            if not given:
                notes.append(f"{setting} names no model: {missing}.")
        if not any(prompt.group == POSE for prompt in self.prompts):
            notes.append("No prompt asks for a pose (the group pose of sampling.groups): Pose hit is n/a.")
        if first.threshold is None:
            notes.append(
                f"Verified is n/a: FAR {FAR:g} needs {1 / FAR:.0f} pairs of photos of two people, there are {len(first.impostors)}."
            )
        for which, digest in self.observer.recognizers.items():
            trained = [run.name for run in self.config.runs if self.generator.recognizer(run) == digest]
            if trained:
                notes.append(
                    f"The {which} recogniser is the one that {', '.join(trained)} was trained with: go by the other one."
                )
        return notes

    def _facts(self) -> dict[str, Any]:
        return {
            **versions(),
            "people": _named(self.config.data.index, self.index.digest),
            "base model": self.config.base.path,
            **{f"adapter {run.name}": run.path for run in self.config.runs},
            "detector": _named(self.config.metrics.faces, self.observer.digests["detector"]),
            "first recogniser": _named(self.config.metrics.faces, self.observer.digests["first"]),
            "second recogniser": _named(self.config.metrics.second, self.observer.digests.get("second", "")),
            "CLIP": _named(self.config.metrics.clip, self.observer.digests["clip"]),
            "expressions": _named(self.config.expression.path, self.observer.digests["expression"]),
        }

    def _report_pictures(self) -> ReportPictures:
        people = {seen.person.name: seen.person for seen in self.people}
        prompts = {prompt.text: prompt for prompt in self.prompts}

        def of_row(row: ImageRow) -> Image:
            return read_picture(self.folder / row.picture)

        def base(row: ImageRow) -> Image:
            assert row.seed is not None
            return self._base(prompts[row.prompt], people[row.identity], row.seed)[1].read()

        return ReportPictures(of_row, lambda row: people[row.identity].references[0].read(), base)


def _named(path: str, digest: str) -> str:
    return f"{path}, digest {digest}" if path else "none"


def _progress(people: tuple[ObservedPerson, ...], name: str) -> Any:
    # Without a terminal, a progress bar would fill the log.
    return require("tqdm").tqdm(people, desc=name, unit="person", disable=None)
