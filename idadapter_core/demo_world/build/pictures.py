"""The pictures for training and tests, with their ground truth.

A folder for each group of people:

    pixels.npy     (N, H, W, 3) uint8, RGB
    masks.npy      (N, H, W) uint8, 255 where the person hides the background
    landmarks.npy  (N, 5, 2) float32, pixels
    boxes.npy      (N, 4) float32, x1, y1, x2, y2 of the head, pixels
    facts.jsonl    a line for each picture: seed and sex of the person, factors, caption

Pictures are drawn in parts, in any order. The facts of a part are written last and atomically, so a part with facts is complete, and an
interrupted build resumes with the parts that are missing.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...files import replacing
from ...waiting import exit_with_parent
from .. import Factors, Light, Person, Pictures, render, seed_of
from .settings import Group, Settings

PART = 64  # pictures per part, about
SEED_TAG = 1_211  # separates the random streams of this stage from others with the same seed
FACTS = "facts.jsonl"


@dataclass(frozen=True)
class Fact:
    """The ground truth of one picture."""

    person: int  # seed
    sex: str
    factors: Factors
    caption: str

    def value(self, factor: str) -> str:
        """Return the class of a factor or of "sex"."""
        return self.sex if factor == "sex" else str(getattr(self.factors, factor))


@dataclass(frozen=True, eq=False)
class PictureSet:
    """The N pictures of a group of people, memory-mapped from its files."""

    pixels: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    landmarks: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    facts: tuple[Fact, ...]

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def people(self) -> npt.NDArray[np.int64]:
        """The number of the person in each picture (N,), counted from 0."""
        seeds = [fact.person for fact in self.facts]
        return np.unique(seeds, return_inverse=True)[1].astype(np.int64)

    def labels(self, factor: str, classes: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the class of each picture (N,), as an index into `classes`."""
        return np.array([classes.index(fact.value(factor)) for fact in self.facts], np.int64)

    def where(self, **classes: str) -> npt.NDArray[np.int64]:
        """Return the numbers of the pictures whose factors have these classes."""
        chosen = [
            number
            for number, fact in enumerate(self.facts)
            if all(fact.value(factor) == value for factor, value in classes.items())
        ]
        return np.array(chosen, np.int64)


def open_pictures(folder: Path, group: str) -> PictureSet:
    """Open the pictures of a group, drawn by `draw_pictures`.

    Raises:
        InputError: they are missing or incomplete.
    """
    home = folder / group
    if not (home / FACTS).is_file():
        raise InputError(
            f"{home} holds no finished pictures of the group {group!r}; run the stage `pictures` with the same --work."
        )
    facts = tuple(_read_fact(line) for line in (home / FACTS).read_text("utf-8").splitlines())
    return PictureSet(**{name: np.load(home / f"{name}.npy", mmap_mode="r") for name in ARRAYS}, facts=facts)


ARRAYS: Mapping[str, tuple[tuple[int | None, ...], type[np.generic]]] = {
    # None stands for the side of a picture.
    "pixels": ((None, None, 3), np.uint8),
    "masks": ((None, None), np.uint8),
    "landmarks": ((5, 2), np.float32),
    "boxes": ((4,), np.float32),
}


@dataclass(frozen=True)
class _Part:
    """Pictures that are drawn together: those of a few people of a group."""

    home: Path
    group: Group
    first: int  # person
    people: int
    size: int
    seed: int

    @property
    def facts(self) -> Path:
        return self.home / "parts" / f"{self.first:06d}.jsonl"


def draw_pictures(
    folder: Path,
    settings: Settings,
    processes: int = 1,
    log: Callable[[str], None] = lambda _: None,
    groups: Collection[str] | None = None,
) -> None:
    """Draw the pictures of some groups (None: of all) into `folder`. Existing parts are kept.

    The files depend only on the settings, not on the number of processes or on interruptions.
    """
    for name, group in settings.groups.items():
        home = folder / name
        if (home / FACTS).is_file() or (groups is not None and name not in groups):
            continue
        _make_room(home, group, settings.size)
        parts = _parts(home, group, settings)
        missing = [part for part in parts if not part.facts.is_file()]
        for count, _ in enumerate(_draw(missing, processes), len(parts) - len(missing) + 1):
            log(f"{name}: {count} of {len(parts)} parts drawn")
        _join(home, parts)


def _make_room(home: Path, group: Group, size: int) -> None:
    (home / "parts").mkdir(parents=True, exist_ok=True)
    for name, (shape, dtype) in ARRAYS.items():
        if not (home / f"{name}.npy").exists():
            sides = tuple(size if side is None else side for side in shape)
            with replacing(home / f"{name}.npy") as file:
                np.lib.format.open_memmap(file, "w+", dtype, (group.count, *sides)).flush()


def _parts(home: Path, group: Group, settings: Settings) -> list[_Part]:
    step = max(1, PART // group.each)
    return [
        _Part(home, group, first, min(step, group.people - first), settings.size, settings.seed)
        for first in range(0, group.people, step)
    ]


def _draw(parts: Sequence[_Part], processes: int) -> Iterator[_Part]:
    if processes == 1:
        for part in parts:
            yield _draw_part(part)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=exit_with_parent)
    try:
        futures = [pool.submit(_draw_part, part) for part in parts]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_part(part: _Part) -> _Part:
    pictures = render(*_subjects(part), part.size)
    start = part.first * part.group.each
    for name in ARRAYS:
        array = np.lib.format.open_memmap(part.home / f"{name}.npy", "r+")
        array[start : start + len(pictures)] = getattr(pictures, name)
        array.flush()
    with replacing(part.facts) as file:
        file.write_text("".join(_lines(pictures)), "utf-8", newline="\n")
    return part


def _subjects(part: _Part) -> tuple[list[Person], list[Factors]]:
    people, factors, group = [], [], part.group
    for index in range(part.first, part.first + part.people):
        rng = np.random.default_rng([SEED_TAG, part.seed, group.stream, index])
        person = Person.sample(seed_of(group.split, index))
        if group.one_look:
            person = person.with_look_of(_model(person.sex))
        for _ in range(group.each):
            people.append(person)
            factors.append(Factors.sample(rng, style=group.style, accessory=group.accessory))
    return people, factors


@functools.cache
def _model(sex: str) -> Person:
    """Return the person whose look all people of this sex have in a group of `one_look`. Nobody is trained on that person."""
    people = (Person.sample(seed_of("validation", index)) for index in itertools.count())
    return next(person for person in people if person.sex == sex)


def _lines(pictures: Pictures) -> Iterator[str]:
    for person, factors, caption in zip(pictures.people, pictures.factors, pictures.captions, strict=True):
        fact = {"person": person.seed, "sex": person.sex, "caption": caption, "factors": asdict(factors)}
        yield json.dumps(fact, separators=(",", ":")) + "\n"


def _read_fact(line: str) -> Fact:
    given: dict[str, Any] = json.loads(line)
    values: dict[str, Any] = given["factors"]
    light = Light(**_with_tuples(values.pop("light")))
    factors = Factors(**_with_tuples(values), light=light)
    return Fact(given["person"], given["sex"], factors, given["caption"])


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Convert lists to tuples, which JSON does not have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _join(home: Path, parts: Sequence[_Part]) -> None:
    """Join the facts of all parts in one file, and delete the parts."""
    with replacing(home / FACTS) as file:
        file.write_text("".join(part.facts.read_text("utf-8") for part in parts), "utf-8", newline="\n")
    shutil.rmtree(parts[0].facts.parent)
