"""Samples: what one row of a batch is made of, drawn from the run's seed, the epoch and the row alone.

A sample has a target picture and the photos by which its person is known: N references or, where the method says so, the target
itself. Where a cache is given, latents and features come from it; else the pixels do, and the trainer computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data.index import Index
from ..data.people import People
from ..data.references import Photo, Preprocess, photo_tensors, references_for
from ..data.rows import OK, STATUSES, Row, Rows, as_rows
from ..errors import ConfigError, IDAdapterError
from ..faces.images import Image
from ..prompts import CAPTION, CLASS_WORD
from ..randomness import generator, positions
from .config import RunConfig

NO_CAPTION = f"a photo of a {CLASS_WORD}"
VALIDATION = -1  # "epochs" from here down are of samples by which a run is measured: the same at every time
_MIRRORED = [1, 0, 2, 4, 3]  # the five landmarks in a mirrored picture

Key = tuple[int, int]  # epoch, place in the list of rows


class Store(Protocol):
    """What a cache gives."""

    def latents(self, row: Row, mirrored: bool) -> Tensor:
        """(8, h, w): mean and standard deviation of the target's latents."""

    def photo(self, photo: Photo) -> Mapping[str, Tensor]:
        """What `photo_tensors` or the trainer's networks make of a photo, without the axis of photos."""


@dataclass(frozen=True)
class Placement:
    """The square of a picture that is trained on."""

    left: int
    top: int
    side: int
    resolution: int
    mirrored: bool

    def picture(self, image: Image) -> Image:
        """The square (R, R, 3) of a picture (H, W, 3)."""
        box = (self.left, self.top, self.left + self.side, self.top + self.side)
        size = (self.resolution, self.resolution)
        square = np.asarray(PILImage.fromarray(image).resize(size, PILImage.Resampling.LANCZOS, box=box))
        return np.ascontiguousarray(square[:, ::-1]) if self.mirrored else square

    def points(self, landmarks: NDArray[np.floating]) -> NDArray[np.float64]:
        """Where landmarks (5, 2) of the picture are in the square; pixel centres at whole numbers."""
        scale = self.resolution / self.side
        moved = (np.asarray(landmarks, np.float64) - [self.left, self.top] + 0.5) * scale - 0.5
        if self.mirrored:
            moved = moved[_MIRRORED]
            moved[:, 0] = self.resolution - 1 - moved[:, 0]
        return moved

    def size_conditioning(self, row: Row) -> list[float]:
        """SDXL's six numbers: height and width of the photo, top and left of the square at the trained scale, height, width."""
        scale = self.resolution / self.side
        side = float(self.resolution)
        left = row.width - self.side - self.left if self.mirrored else self.left  # in the photo as it is seen
        return [float(row.height), float(row.width), self.top * scale, left * scale, side, side]


def place(row: Row, resolution: int, mirrored: bool) -> Placement:
    """The largest square in a row's picture whose middle is as near to the face's as it can be. Nothing is stretched."""
    side = min(row.width, row.height)
    x1, y1, x2, y2 = row.box or (0, 0, row.width, row.height)
    left = min(max(round((x1 + x2 - side) / 2), 0), row.width - side)
    top = min(max(round((y1 + y2 - side) / 2), 0), row.height - side)
    return Placement(left, top, side, resolution, mirrored)


def target_picture(image: Image, row: Row, resolution: int, mirrored: bool) -> Tensor:
    """The picture to be learned, (3, R, R), RGB in -1..1, from the row's photo (H, W, 3)."""
    pixels = place(row, resolution, mirrored).picture(image)
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples side by side. What a cache or its absence leaves out is None."""

    rows: tuple[int, ...]  # numbers of the index
    sources: tuple[str, ...]  # for messages
    prompts: tuple[str, ...]  # without the identity
    class_nouns: tuple[str, ...]
    identity: Tensor  # (B,) bool: False where the identity is dropped
    timesteps: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    posterior: Tensor  # (B, C, h, w) noise by which latents are drawn from the VAE's distribution
    landmarks: Tensor  # (B, 5, 2) in the target picture
    sizes: Tensor  # (B, 6), see Placement.size_conditioning
    pictures: Tensor | None = None  # (B, 3, R, R), RGB in -1..1
    moments: Tensor | None = None  # (B, 8, h, w)
    crops: Tensor | None = (
        None  # (B, N + 1, 3, 112, 112): the references' faces, then the target's; or the target's alone
    )
    heads: Tensor | None = None  # (B, N, 3, S, S) for CLIP vision
    embedding: Tensor | None = None  # (B, N + 1, 512) of the crops
    stages: tuple[Tensor, ...] = ()  # four maps (B, C, side, side) of the target, the first three at 16 x 16
    patch_tokens: Tensor | None = None  # (B, N, P, d)
    class_embedding: Tensor | None = None  # (B, N, d)

    def __len__(self) -> int:
        return len(self.rows)

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a device can copy by itself. Called by the loader."""
        pinned: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                pinned[entry.name] = value.pin_memory()
            elif entry.name == "stages":
                pinned[entry.name] = tuple(stage.pin_memory() for stage in value)
        return replace(self, **pinned)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device, in fp32 where a cache is narrower. What decides what is computed stays on the CPU."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in _ON_HOST:
                continue
            if isinstance(value, Tensor):
                moved[entry.name] = _moved(value, device)
            elif entry.name == "stages":
                moved[entry.name] = tuple(_moved(stage, device) for stage in value)
        return replace(self, **moved)


_ON_HOST = ("identity", "timesteps", "landmarks")  # read back from a device, they would have to be waited for


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    tensor = tensor.to(device, non_blocking=True)
    return tensor.float() if tensor.is_floating_point() else tensor


STAGE_NAMES = tuple(f"stage_{number}" for number in range(1, 5))


class Samples(Dataset["dict[str, Any] | IDAdapterError"]):
    """The samples of a run by (epoch, place). Nothing else decides what a sample is.

    A photo that cannot be read any more is an error in the place of its sample: raised in a worker, it would come out as a page
    of traceback.
    """

    def __init__(
        self,
        index: Index,
        rows: Sequence[Row],
        config: RunConfig,
        timesteps: int,
        store: Store | None = None,
        preprocess: Preprocess | None = None,
        latent_channels: int = 4,
    ) -> None:
        self._index, self.rows, self._config = index, as_rows(rows), config
        self._channels = latent_channels
        self._timesteps, self._store, self._preprocess = timesteps, store, preprocess
        self._people = People(self.rows)
        self._whose = self._people.of  # made here, so that forked workers share it
        self._by_target = config.recipe.known_by_target

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Any] | IDAdapterError:
        try:
            return self.sample(*key)
        except IDAdapterError as error:
            return error

    def sample(self, epoch: int, number: int) -> dict[str, Any]:
        """One sample, under the names of `Batch`."""
        row = self.rows[number]
        config = self._config
        seed = config.train.seed
        random = generator(seed, epoch, row.number, "draw")
        # All is drawn in any case, so that one setting does not change what the others draw.
        drop, mirror = torch.rand(2, generator=random).tolist()
        timestep = int(torch.randint(self._timesteps, (), generator=random))
        person = self._people[int(self._whose[number])]
        references = references_for(row, person, config.data.references, random)
        is_measured = epoch <= VALIDATION
        mirrored = config.data.flip and mirror < 0.5 and not is_measured
        has_identity, has_text = (True, True) if is_measured else _kept(drop, config)
        placement = place(row, config.data.resolution, mirrored)
        side = config.data.resolution // 8
        shape = (self._channels, side, side)
        sample: dict[str, Any] = {
            "rows": row.number,
            "sources": row.source,
            "prompts": prompt_of(row, config) if has_text else "",
            "class_nouns": row.class_noun or "person",
            "identity": torch.tensor(has_identity),
            "timesteps": torch.tensor(timestep),
            "noise": torch.randn(shape, generator=generator(seed, epoch, row.number, "noise")),
            "posterior": torch.randn(shape, generator=generator(seed, epoch, row.number, "posterior")),
            "landmarks": torch.from_numpy(placement.points(np.array(row.landmarks))).float(),
            "sizes": torch.tensor(placement.size_conditioning(row)),
        }
        target = Photo(row)
        known_by = [] if self._by_target else references
        if self._store is None:
            image = self._index.load(row)
            sample["pictures"] = target_picture(image, row, config.data.resolution, mirrored)
            tensors = [
                photo_tensors(self._index.load(photo.row), photo, self._preprocess) for photo in known_by
            ]
            tensors.append(photo_tensors(image, target, None))
        else:
            sample["moments"] = self._store.latents(row, mirrored)
            tensors = [dict(self._store.photo(photo)) for photo in [*known_by, target]]
        return sample | _stacked(tensors, self._by_target)


def _stacked(photos: list[dict[str, Tensor]], by_target: bool) -> dict[str, Any]:
    """Tensors of photos, the target's last, in the shapes of `Batch` without its first axis."""
    stacked: dict[str, Any] = {}
    for name in photos[0]:
        if name in STAGE_NAMES:
            continue
        # The target's face says who is wanted; for all else the references are looked at.
        seen = photos if name in ("crops", "embedding") or by_target else photos[:-1]
        stacked[name] = torch.stack([tensors[name] for tensors in seen])
    if STAGE_NAMES[0] in photos[-1]:
        stacked["stages"] = tuple(photos[-1][name] for name in STAGE_NAMES)
    return stacked


def _kept(draw: float, config: RunConfig) -> tuple[bool, bool]:
    """Whether a sample keeps its identity and its text."""
    train = config.train
    if draw < train.drop_identity:
        return False, True
    if draw < train.drop_identity + train.drop_text:
        return True, False
    return (False, False) if draw < train.drop_identity + train.drop_text + train.drop_both else (True, True)


def prompt_of(row: Row, config: RunConfig) -> str:
    """The prompt of a row, without the identity word."""
    template = config.data.prompt or config.recipe.prompt
    if CAPTION in template:
        template = template.replace(CAPTION, row.caption or NO_CAPTION)
    return template.replace(CLASS_WORD, row.class_noun or "person")


def collate(samples: Sequence[Mapping[str, Any] | IDAdapterError]) -> Batch | IDAdapterError:
    """Samples side by side, or the first error among them."""
    for sample in samples:
        if isinstance(sample, IDAdapterError):
            return sample
    return join([sample for sample in samples if not isinstance(sample, IDAdapterError)])


def join(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples side by side."""
    values: dict[str, Any] = {}
    for name, first in samples[0].items():
        each = [sample[name] for sample in samples]
        if isinstance(first, Tensor):
            values[name] = torch.stack(each)
        elif isinstance(first, tuple):
            values[name] = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        else:
            values[name] = tuple(each)
    return Batch(**values)


class MicroBatches(Sampler[list[Key]]):
    """The samples of one process, micro-batch by micro-batch, from a step to another.

    All processes together go through one sequence. Step `start` begins at `position` of it (by default start * global_batch_size),
    each step has the next `train.global_batch_size` samples, its first micro-batch the first global_batch_size /
    gradient_accumulation_steps of them, and of each micro-batch the processes have equal parts side by side.
    """

    def __init__(
        self,
        config: RunConfig,
        count: int,
        start: int,
        *,
        position: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        share = world * config.train.gradient_accumulation_steps
        if config.train.global_batch_size % share:
            raise ConfigError(
                f"train.global_batch_size is {config.train.global_batch_size}, which {world} process{'es' if world > 1 else ''} with train.gradient_accumulation_steps = "
                f"{config.train.gradient_accumulation_steps} cannot share evenly; make it a multiple of {share}"
            )
        self._config, self._count, self._start = config, count, start
        self._position = start * config.train.global_batch_size if position is None else position
        self._rank, self._world = rank, world
        self.size = config.train.global_batch_size // share  # of a micro-batch of one process

    def __len__(self) -> int:
        return (self._config.train.steps - self._start) * self._config.train.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[Key]]:
        train = self._config.train
        for step in range(self._start, train.steps):
            begin = self._position + (step - self._start) * train.global_batch_size
            keys = positions(train.seed, begin, begin + train.global_batch_size, self._count)
            for micro in range(train.gradient_accumulation_steps):
                first = (micro * self._world + self._rank) * self.size
                yield keys[first : first + self.size]


def usable_rows(index: Index, config: RunConfig, split: str) -> Rows:
    """The rows that a run may learn from ("train") or is measured by ("test").

    Raises:
        ConfigError: too large a share of the photos is bad, or no row is left.
    """
    bad = index.bad_share()
    if bad > config.data.max_bad_share:
        fine = [STATUSES.index(OK), STATUSES.index("duplicate")]
        worst = index.rows.where(~np.isin(index.rows.status, fine))[:10]
        listed = "\n".join(f"  {row.source}: {row.status}, {row.reason}" for row in worst)
        raise ConfigError(
            f"{index.path}: {bad:.1%} of its photos cannot be used, data.max_bad_share allows "
            f"{config.data.max_bad_share:.1%}. Repair or remove them and scan again, or raise the limit. The first ones:\n{listed}"
        )
    rows = index.usable(split)
    if config.data.min_photos > 1:
        people = People(rows)
        rows = rows.where((people.sizes >= config.data.min_photos)[people.of])
    if not rows and split == "train":
        raise ConfigError(
            f"{index.path}: no photo is left to train on (data.min_photos = {config.data.min_photos}). See "
            "`python -m idadapter_core stats` for what there is."
        )
    return rows
