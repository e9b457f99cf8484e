"""Throughput of training samples: with the cache, without it, and as in UniID's published trainer.

    python -m benchmarks.training_throughput [--rounds 9]

Four ways to make a batch, all for a UniID adapter on a tiny SDXL, drawn photos of 512 px and the tiny face package:

- cached: latents and features come from the cache;
- uncached: the loader decodes and crops, the face network and the VAE run in each step;
- published: the data loader decodes, detects at 640 px, aligns and squashes the photo to a square at every visit; the face network,
  the VAE and the text encoders, for every prompt of the batch, run in each step (lyuPang/UniID@41cd236, load_data.py and
  train_uniid.py; reimplemented here);
- published, ladder: the same with our detector's sizes from 640 down to 128 px, which finds the faces that 640 px alone misses.

Everything runs in one process on one thread, so CPU times are exact under any other load. Rounds are interleaved; the output shows
medians over rounds. Tiny models distort shares: `benchmarks/on_gpu` times a step at real size.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any library reads it

import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from idadapter_core.config import parse_config
from idadapter_core.data.index import Index
from idadapter_core.data.references import PhotoVariant
from idadapter_core.data.rows import Row
from idadapter_core.data.scan import scan
from idadapter_core.data.sources import list_photos
from idadapter_core.data.split import SplitSettings
from idadapter_core.faces.align import align_face
from idadapter_core.faces.detector import FaceAnalyzer, open_analyzer, select_faces
from idadapter_core.faces.features import crops_to_tensor
from idadapter_core.faces.images import Image
from idadapter_core.faces.iresnet import IResNet, save_iresnet
from idadapter_core.randomness import positions
from idadapter_core.stable_diffusion.text import Conditioning
from idadapter_core.training.adapters import trainable
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.cache import Cache, build, kinds
from idadapter_core.training.config import RunConfig
from idadapter_core.training.parts import Parts, load_parts, prepare_adapter
from idadapter_core.training.samples import Batch, Samples, join
from tests.golden import recipe
from tests.harness.shim import run_shim
from tests.tiny.bases import write_diffusers_base
from tests.tiny.face_package import write_package
from tests.tiny.people import write_people

PEOPLE, PHOTOS, SIZE, RESOLUTION = 6, 4, 512, 64
BATCH, STEPS = 4, 2  # samples per step; steps per round
DECODE, DETECT, CUT, READ, DRAW = "decode", "detect", "align, cut out", "read the cache", "draw, join"
RECOGNISE, ENCODE, TEXT = "recognise", "VAE encode", "text encoders"
LEARN, UPDATE = "UNet and adapter, forward and backward", "optimizer"
PARTS = (DECODE, DETECT, CUT, READ, DRAW, RECOGNISE, ENCODE, TEXT, LEARN, UPDATE)


class Clock:
    """CPU time by part. Time in nested parts counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._pass()
        self._open.append(name)
        try:
            yield
        finally:
            self._pass()
            self._open.pop()

    def _pass(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


CLOCK = Clock()


# ------------------------------------------------------------------------------------------------------ ways


class TimedIndex(Index):
    def load(self, row: Row) -> Image:
        with CLOCK.part(DECODE):
            return super().load(row)


class TimedStore:
    def __init__(self, store: Cache) -> None:
        self._store = store

    def latents(self, row: Row, mirrored: bool) -> Tensor:
        with CLOCK.part(READ):
            return self._store.latents(row, mirrored)

    def photo(self, photo: PhotoVariant) -> Mapping[str, Tensor]:
        with CLOCK.part(READ):
            return self._store.photo(photo)


class PublishedSamples:
    """Samples as made by UniID's data loader, without those of its faults that cost no time."""

    def __init__(self, index: Index, rows: Sequence[Row], analyzer: FaceAnalyzer, timesteps: int) -> None:
        self._index, self._rows, self._analyzer, self._timesteps = index, rows, analyzer, timesteps
        self.visits = self.missed = 0

    def sample(self, epoch: int, number: int) -> dict[str, Any]:
        self.visits += 1
        row = self._rows[number]
        with CLOCK.part(DECODE):
            image = np.asarray(PILImage.open(self._index.root / row.source).convert("RGB"))
        with CLOCK.part(DETECT):
            faces = self._analyzer.detect(image)
        with CLOCK.part(CUT):
            picture = _resized(image, RESOLUTION)
            noun = "person"
            if faces:
                face = select_faces(faces)[0]
                crop = align_face(image, face.landmarks)
                noun = "man" if face.sex == "M" else "woman"
            else:
                self.missed += 1
                crop = _resized(image, 112)
        shape = (4, RESOLUTION // 8, RESOLUTION // 8)
        return {
            "rows": row.number,
            "sources": row.source,
            "prompts": f"a photo of a {noun}",
            "class_nouns": noun,
            "identity": torch.rand(()) >= 0.1,
            "timesteps": torch.randint(self._timesteps, ()),
            "noise": torch.randn(shape),
            "posterior": torch.randn(shape),
            "landmarks": torch.zeros(5, 2),  # only used by L_id, which UniID does not have
            "sizes": torch.tensor([*map(float, image.shape[:2]), 0.0, 0.0, RESOLUTION, RESOLUTION]),
            "pictures": crops_to_tensor([picture])[0],
            "crops": crops_to_tensor([crop]),
        }


def _resized(image: Image, side: int) -> Image:
    return np.asarray(PILImage.fromarray(image).resize((side, side), PILImage.Resampling.BILINEAR))


@dataclass
class Way:
    """A way to make batches, and its measurements."""

    name: str
    source: Samples | PublishedSamples
    encodes_text: bool = False  # every prompt in each step
    draws: str = DRAW  # part that the time of a sample counts for, outside of nested parts
    wall: list[float] = field(default_factory=list)  # seconds per sample, by round
    # CPU seconds per sample, by round.
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def cpu(self) -> list[float]:
        return [sum(values) for values in zip(*(self.parts[name] for name in PARTS), strict=True)]


class World:
    """The photos, models and training step shared by all ways."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _write_world(folder)
        self.parts: Parts = load_parts(self.config)
        if sum(build(self.parts, self.config).values()) == 0:
            raise SystemExit("nothing was written to the cache")
        adapter = prepare_adapter(self.config, self.parts)
        parameters = trainable(adapter)
        self.bundle = Bundle(self.parts.base, adapter, self.parts.networks, self.config)
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=True)

    def ways(self) -> list[Way]:
        index, rows = self.parts.index, self.parts.train_rows
        timed = TimedIndex(*(getattr(index, entry.name) for entry in fields(index)))
        steps = self.parts.base.schedule.steps
        store = TimedStore(Cache(Path(self.config.data.cache), kinds(self.parts, self.config)))
        package = Path(self.config.base.face_package)
        ladder, alone = (open_analyzer(package, "cpu", threads=1) for _ in range(2))
        alone._sizes, alone._padded_sizes = [(640, 640)], []
        return [
            Way("cached", Samples(timed, rows, self.config, steps, store)),
            Way("uncached", Samples(timed, rows, self.config, steps), draws=CUT),
            Way("published", PublishedSamples(index, rows, alone, steps), encodes_text=True),
            Way("published, ladder", PublishedSamples(index, rows, ladder, steps), encodes_text=True),
        ]

    def learn(self, way: Way, keys: Sequence[tuple[int, int]]) -> None:
        """Run one training step."""
        batch = self.batch(way, keys)
        with CLOCK.part(LEARN):
            self.bundle(batch)["loss"].backward()
        with CLOCK.part(UPDATE):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def batch(self, way: Way, keys: Sequence[tuple[int, int]]) -> Batch:
        """Make a complete batch in the given way."""
        with CLOCK.part(way.draws):
            samples = [way.source.sample(*key) for key in keys]
        with CLOCK.part(DRAW):
            batch = join(samples).to("cpu")
        with CLOCK.part(RECOGNISE):
            batch = self.bundle.complete(batch)
        if batch.moments is None:
            assert batch.pictures is not None
            with CLOCK.part(ENCODE):
                batch = replace(batch, moments=self.parts.base.vae.moments(batch.pictures))
        if way.encodes_text:
            with CLOCK.part(TEXT):
                self._encode_all(batch)
        return batch

    @torch.no_grad()
    def _encode_all(self, batch: Batch) -> None:
        """Run every prompt through the text encoders, including repeated ones."""
        made = self.parts.base.text.encode(batch.prompts)
        for number, prompt in enumerate(batch.prompts):
            pooled = None if made.pooled is None else made.pooled[number : number + 1]
            self.bundle._states[prompt] = Conditioning(made.states[number : number + 1], pooled)


def _write_world(folder: Path) -> RunConfig:
    write_people(folder / "photos", PEOPLE, PHOTOS, SIZE)
    write_package(folder / "package")
    write_diffusers_base(folder / "base", "sdxl")
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    save_iresnet(network, folder / "recognizer.safetensors")
    scan(
        list_photos(folder / "photos"),
        folder / "index.parquet",
        package=folder / "package",
        split=SplitSettings(share=0),
    )
    content = {
        "base": {
            "path": str(folder / "base"),
            "family": "sdxl",
            "recognizer": str(folder / "recognizer.safetensors"),
            "face_package": str(folder / "package"),
        },
        "data": {
            "index": str(folder / "index.parquet"),
            "cache": str(folder / "cache"),
            "resolution": RESOLUTION,
            "flip": False,
            "workers": 0,
        },
        "adapter": {"method": "uniid"},
        "loss": {"identity": 0.0},
        "train": {"drop_identity": 0.1, "drop_text": 0.0, "drop_both": 0.0},
    }
    return parse_config(RunConfig, content)


# ------------------------------------------------------------------------------------------------------ tiny models


def measure(world: World, ways: Sequence[Way], rounds: int) -> None:
    count = len(world.parts.train_rows)
    for number in range(rounds + 1):
        keys = positions(0, number * STEPS * BATCH, (number + 1) * STEPS * BATCH, count)
        for way in random.Random(number).sample(ways, len(ways)):
            CLOCK.seconds.clear()
            started = time.perf_counter()
            for first in range(0, len(keys), BATCH):
                world.learn(way, keys[first : first + BATCH])
            if number:  # the first round warms up
                way.wall.append((time.perf_counter() - started) / len(keys))
                for name in PARTS:
                    way.parts[name].append(CLOCK.seconds[name] / len(keys))


def require_alike(world: World, cached: Way, uncached: Way) -> None:
    """Check that both of our ways give the same loss; the cache is in half precision."""
    keys = positions(0, 0, BATCH, len(world.parts.train_rows))
    with torch.no_grad():
        losses = [float(world.bundle(world.batch(way, keys))["loss"]) for way in (cached, uncached)]
    if abs(losses[0] - losses[1]) > 0.01 * abs(losses[1]):
        raise SystemExit(f"with the cache the loss is {losses[0]:.4f}, without it {losses[1]:.4f}")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def report(ways: Sequence[Way], rounds: int) -> None:
    published = next(way for way in ways if way.name == "published")
    print(f"\nTiny models, {rounds} rounds of {STEPS} steps of {BATCH} samples, one thread; medians.\n")
    print("| way | samples/s | samples per CPU second | times the published way | largest part |")
    print("|---|---|---|---|---|")
    for way in ways:
        ratio = statistics.median(theirs / own for theirs, own in zip(published.cpu, way.cpu, strict=True))
        largest = max(PARTS, key=lambda name: statistics.median(way.parts[name]))
        share = statistics.median(
            part / whole for part, whole in zip(way.parts[largest], way.cpu, strict=True)
        )
        print(
            f"| {way.name} | {1 / statistics.median(way.wall):.1f} | {1 / statistics.median(way.cpu):.1f} | {ratio:.2f} | "
            f"{largest}, {percent(share)} |"
        )
    saved = statistics.median(
        1 - ours / theirs for ours, theirs in zip(ways[0].cpu, published.cpu, strict=True)
    )
    first, second = sorted(PARTS, key=lambda name: -statistics.median(published.parts[name]))[:2]
    both = zip(published.parts[first], published.parts[second], published.cpu, strict=True)
    share = statistics.median((one + other) / whole for one, other, whole in both)
    print(
        f"\nThe published way: {first} and {second} dominate, with {percent(share)} of the time; the cache saves {percent(saved)} of it."
    )
    print("\nCPU ms for a sample\n")
    print(f"| part | {' | '.join(way.name for way in ways)} |")
    print(f"|---{'|---' * len(ways)}|")
    for name in PARTS:
        cells = [f"{1e3 * statistics.median(way.parts[name]):.2f}" for way in ways]
        print(f"| {name} | {' | '.join(cells)} |")
    cells = [f"{1e3 * statistics.median(way.cpu):.2f}" for way in ways]
    print(f"| all | {' | '.join(cells)} |")
    for way in ways:
        if isinstance(way.source, PublishedSamples):
            print(f"\n{way.name}: no face in {way.source.missed} of {way.source.visits} visits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run_shim()
    import cv2

    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(folder)
        ways = world.ways()
        require_alike(world, ways[0], ways[1])
        measure(world, ways, options.rounds)
        print(f"torch {torch.__version__}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
        report(ways, options.rounds)


if __name__ == "__main__":
    main()
