"""Training samples, drawn from the run's seed, the epoch and the row alone.

A sample is a target image and the photos that identify its person: N references or, for some methods, the target itself. Latents and
features come from the cache, if there is one; otherwise a sample has pixels, and the trainer computes the rest.
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
from ..data.references import PhotoVariant, Preprocess, photo_tensors, references_for
from ..data.rows import OK, STATUSES, Row, Rows, as_rows
from ..errors import ConfigError, IDAdapterError
from ..faces.images import Image
from ..placeholders import CAPTION, CLASS_WORD
from ..randomness import generator, positions
from .config import RunConfig

NO_CAPTION = f"a photo of a {CLASS_WORD}"
VALIDATION = -1  # negative epochs are validation samples, equal in every validation
_MIRRORED = [1, 0, 2, 4, 3]  # order of the five landmarks in a mirrored image

Key = tuple[int, int]  # epoch, position in the list of rows


class Store(Protocol):
    """Interface of a cache."""

    def latents(self, row: Row, mirrored: bool) -> Tensor:
        """Mean and standard deviation of the target's latents, (8, h, w)."""

    def photo(self, photo: PhotoVariant) -> Mapping[str, Tensor]:
        """Features of one photo, as `photo_tensors` or the trainer's networks compute them, without the photo axis."""


@dataclass(frozen=True)
class Placement:
    """The square of an image used for training."""

    left: int
    top: int
    side: int
    resolution: int
    mirrored: bool

    def picture(self, image: Image) -> Image:
        """Crop an image (H, W, 3) to the square (R, R, 3)."""
        box = (self.left, self.top, self.left + self.side, self.top + self.side)
        size = (self.resolution, self.resolution)
        square = np.asarray(PILImage.fromarray(image).resize(size, PILImage.Resampling.LANCZOS, box=box))
        return np.ascontiguousarray(square[:, ::-1]) if self.mirrored else square

    def points(self, landmarks: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map landmarks (5, 2) from the image to the square. Pixel centres are at integers."""
        scale = self.resolution / self.side
        moved = (np.asarray(landmarks, np.float64) - [self.left, self.top] + 0.5) * scale - 0.5
        if self.mirrored:
            moved = moved[_MIRRORED]
            moved[:, 0] = self.resolution - 1 - moved[:, 0]
        return moved

    def size_conditioning(self, row: Row) -> list[float]:
        """SDXL's six numbers: height and width of the photo, top and left of the crop at the training scale, height, width."""
        scale = self.resolution / self.side
        side = float(self.resolution)
        left = row.width - self.side - self.left if self.mirrored else self.left  # in the photo as displayed
        return [float(row.height), float(row.width), self.top * scale, left * scale, side, side]


def place(row: Row, resolution: int, mirrored: bool) -> Placement:
    """The largest square in a row's image, centred as near to the face as possible. Nothing is stretched."""
    side = min(row.width, row.height)
    x1, y1, x2, y2 = row.box or (0, 0, row.width, row.height)
    left = min(max(round((x1 + x2 - side) / 2), 0), row.width - side)
    top = min(max(round((y1 + y2 - side) / 2), 0), row.height - side)
    return Placement(left, top, side, resolution, mirrored)


def target_picture(image: Image, row: Row, resolution: int, mirrored: bool) -> Tensor:
    """The target image (3, R, R), RGB in -1..1, from the row's photo (H, W, 3)."""
    pixels = place(row, resolution, mirrored).picture(image)
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of B samples. Fields that the cache, or its absence, leaves out are None."""

    rows: tuple[int, ...]  # numbers in the index
    sources: tuple[str, ...]  # for messages
    prompts: tuple[str, ...]  # without the identity
    class_nouns: tuple[str, ...]
    identity: Tensor  # (B,) bool: False where the identity is dropped
    timesteps: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    posterior: Tensor  # (B, C, h, w) noise for sampling the latents from the VAE's distribution
    landmarks: Tensor  # (B, 5, 2) in the target image
    sizes: Tensor  # (B, 6), see Placement.size_conditioning
    denoising: Tensor  # (B, 2) in 0..1: where L_id's denoising begins and ends, between its bounds
    pictures: Tensor | None = None  # (B, 3, R, R), RGB in -1..1
    moments: Tensor | None = None  # (B, 2 C, h, w)
    # (B, N + 1, 3, 112, 112): faces of the references, then of the target; or of the target alone.
    crops: Tensor | None = None
    heads: Tensor | None = None  # (B, N, 3, S, S) for CLIP vision
    embedding: Tensor | None = None  # (B, N + 1, 512) of the crops
    stages: tuple[Tensor, ...] = ()  # four maps (B, C, side, side) of the target, the first three 16 x 16
    patch_tokens: Tensor | None = None  # (B, N, P, d)
    class_embedding: Tensor | None = None  # (B, N, d)

    def __len__(self) -> int:
        return len(self.rows)

    def pin_memory(self) -> Batch:
        """Copy the batch to pinned memory. Called by the loader."""
        pinned: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                pinned[entry.name] = value.pin_memory()
            elif entry.name == "stages":
                pinned[entry.name] = tuple(stage.pin_memory() for stage in value)
        return replace(self, **pinned)

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device, in fp32 even if the cache is narrower. Fields that control the computation stay on the CPU."""
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


# Reading them back from a device would wait for it.
_ON_HOST = ("identity", "timesteps", "landmarks", "denoising")


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    tensor = tensor.to(device, non_blocking=True)
    return tensor.float() if tensor.is_floating_point() else tensor


STAGE_NAMES = tuple(f"stage_{number}" for number in range(1, 5))


class Samples(Dataset["dict[str, Any] | IDAdapterError"]):
    """The samples of a run, by (epoch, position). A sample depends on nothing else.

    For an unreadable photo, the sample is an error object: an exception raised in a worker would be shown with a long traceback.
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
        """Make one sample, with the field names of `Batch`."""
        row = self.rows[number]
        config = self._config
        seed = config.train.seed
        random = generator(seed, epoch, row.number, "draw")
        # Draw every number even if it is unused, so that one setting does not change the others' draws.
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
            "denoising": torch.rand(2, generator=generator(seed, epoch, row.number, "denoising")),
        }
        known_by = (
            [PhotoVariant(self._shown(epoch, row, person))]
            if self._by_target
            else [*self._with_own(epoch, row, references), PhotoVariant(row)]
        )
        if self._store is None:
            image = self._index.load(row)
            sample["pictures"] = target_picture(image, row, config.data.resolution, mirrored)
            *others, last = known_by
            tensors = [
                photo_tensors(self._index.load(photo.row), photo, self._preprocess) for photo in others
            ]
            shown = image if last.row is row else self._index.load(last.row)
            tensors.append(photo_tensors(shown, last, None))
        else:
            sample["moments"] = self._store.latents(row, mirrored)
            tensors = [dict(self._store.photo(photo)) for photo in known_by]
        return sample | _stacked(tensors, self._by_target)

    def _with_own(self, epoch: int, row: Row, references: list[PhotoVariant]) -> list[PhotoVariant]:
        """The references, with the target in the place of one in the configured share of samples."""
        share = self._config.data.own_photo
        random = generator(self._config.train.seed, epoch, row.number, "own photo")
        if not share or float(torch.rand((), generator=random)) >= share:
            return references
        place = int(torch.randint(len(references), (), generator=random))
        return [*references[:place], PhotoVariant(row), *references[place + 1 :]]

    def _shown(self, epoch: int, row: Row, person: Sequence[Row]) -> Row:
        """The photo that tells a method who the person is, where the target is its own reference."""
        share = self._config.data.other_photo
        others = [other for other in person if other.number != row.number] if share else []
        if not others:
            return row
        random = generator(self._config.train.seed, epoch, row.number, "other photo")
        if float(torch.rand((), generator=random)) >= share:
            return row
        return others[int(torch.randint(len(others), (), generator=random))]


def _stacked(photos: list[dict[str, Tensor]], by_target: bool) -> dict[str, Any]:
    """Stack the tensors of photos, the target's last, in the shapes of `Batch` without the batch axis."""
    stacked: dict[str, Any] = {}
    for name in photos[0]:
        if name in STAGE_NAMES:
            continue
        # The target's face gives the identity to match; all other features come from the references.
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
    """Stack samples into a batch, or return the first error among them."""
    for sample in samples:
        if isinstance(sample, IDAdapterError):
            return sample
    return join([sample for sample in samples if not isinstance(sample, IDAdapterError)])


def join(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack samples into a batch."""
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
    """Iterator over the micro-batches of one process, from one step to another.

    All processes share one sequence of samples. Step `start` begins at `position` in it (default: start * global_batch_size). Each step
    takes the next `train.global_batch_size` samples and splits them into micro-batches of global_batch_size /
    gradient_accumulation_steps. Each micro-batch is split evenly, in consecutive parts, among the processes.
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
        self.size = config.train.global_batch_size // share  # micro-batch size of one process

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
    """Rows for training (split "train") or validation ("test").

    Raises:
        ConfigError: too many unusable photos, or no row is left.
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
