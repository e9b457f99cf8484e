"""Cache of repeated computations: latents of the targets, crops and features of the photos.

    <data.cache>/
      latents-<digest>/   facts.json   part-<key>.safetensors ...
      photos-<digest>/    facts.json   part-<key>.safetensors ...

The digest in a folder's name covers everything its content depends on except the photos: networks, sizes, and the version of these
computations. An entry's key is a digest of the photo's bytes and of the face's position. After a change of photo, scan or network,
entries are therefore missing and get built; stale ones are never used. Parts are written completely or not at all, so an interrupted
build continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import writable
from ..data.index import Index
from ..data.references import PhotoVariant, Preprocess, photo_tensors
from ..data.rows import Row, as_rows
from ..errors import ConfigError, IDAdapterError
from ..files import read_metadata, write_file, write_safetensors
from ..stable_diffusion.networks import encode_heads
from .bundle import recognize
from .config import RunConfig
from .entries import Entries, Entry, Keys, keys_of, latents_key, photo_key
from .loading import Batches, prepare_worker
from .parts import Parts
from .samples import STAGE_NAMES, target_picture

VERSION = 2  # of the computations below and of decoding; increase it to invalidate all entries
PART = 512  # entries per part
_LONGEST = 30.0  # seconds per part
_PIXELS = 16 * 512**2  # total pixels of targets per VAE batch: some gigabytes in fp32
_FACES = 16  # photos per batch of the other networks
KEYS = "keys"  # metadata key of a part
FACTS = "facts.json"
_OPEN_PARTS = 64


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of entries, each with its own folder."""

    name: str  # "latents" or "photos"
    facts: Mapping[str, Any]
    entries: Entries = field(repr=False)

    def folder(self, root: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]
        return root / f"{self.name}-{digest}"


def kinds(parts: Parts, config: RunConfig) -> tuple[Kind, Kind]:
    """The two kinds of entries that a run needs."""
    splits = (as_rows(parts.train_rows), as_rows(parts.test_rows))
    # Validation targets are never mirrored.
    latents = Entries.latents(splits, splits[0] if config.data.flip else None)
    photos = Entries.photos(splits, 0 if config.recipe.known_by_target else config.data.references)
    latent_facts = {"version": VERSION, "vae": parts.base.vae.digest, "resolution": config.data.resolution}
    photo_facts = {"version": VERSION, "recognizer": parts.recognizer_digest, "method": config.adapter.method}
    photo_facts |= {"features": config.data.cache_features}
    if config.needs.vision is not None:
        assert parts.networks.vision is not None
        photo_facts["vision"] = parts.networks.vision.digest
    return Kind("latents", latent_facts, latents), Kind("photos", photo_facts, photos)


class Folder:
    """The entries of one kind on disk."""

    def __init__(self, path: Path) -> None:
        _open.cache_clear()  # parts may have been deleted and rewritten
        self.path = path
        self._names = [part.name for part in sorted(path.glob("part-*.safetensors"))]
        keys = [np.zeros((0, 2), np.uint64), *(self._keys(path / name) for name in self._names)]
        sizes = [len(found) for found in keys[1:]]
        joined = np.concatenate(keys)
        order = np.lexsort((joined[:, 1], joined[:, 0]))
        self._high, self._low = joined[order, 0], joined[order, 1]  # each contiguous, for searching
        self._part = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)[order]
        self._place = np.concatenate([np.arange(size, dtype=np.uint32) for size in (0, *sizes)])[order]

    def _keys(self, part: Path) -> Keys:
        try:
            return keys_of(json.loads(read_metadata(part)[KEYS]))
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{part}: no part of a cache ({error}). Delete it and run `python -m idadapter_core cache build` again."
            ) from error

    def has(self, keys: Keys) -> NDArray[np.bool_]:
        """(entries,) whether each key is present."""
        return self._find(keys) >= 0

    def __contains__(self, key: str) -> bool:
        return bool(self.has(keys_of([key]))[0])

    def __len__(self) -> int:
        return len(self._high)

    def read(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of an entry. Only its own bytes of the file are read."""
        number = int(self._find(keys_of([key]))[0])
        if number < 0:
            raise KeyError(key)
        file = _open(self.path / self._names[self._part[number]])
        place = int(self._place[number])
        return {tensor: file.get_slice(tensor)[place] for tensor in file.keys()}  # noqa: SIM118

    def _find(self, keys: Keys) -> NDArray[np.int64]:
        """(entries,) positions of keys among the sorted ones; -1: missing."""
        if not len(self):
            return np.full(len(keys), -1)
        found = np.searchsorted(self._high, keys[:, 0]).clip(max=len(self) - 1)
        while True:  # once, unless keys share their first half
            is_half = self._high[found] == keys[:, 0]
            is_there = is_half & (self._low[found] == keys[:, 1])
            goes_on = is_half & ~is_there & (found + 1 < len(self))
            if not goes_on.any():
                return np.where(is_there, found, -1)
            found[goes_on] += 1


@lru_cache(maxsize=_OPEN_PARTS)
def _open(path: Path) -> Any:
    return safetensors.safe_open(path, framework="pt")


class Cache:
    """The cache of a run, a `samples.Store`.

    Raises:
        ConfigError: an entry that the run needs is missing.
    """

    def __init__(self, root: Path, needed: Sequence[Kind]) -> None:
        folders = [Folder(kind.folder(root)) for kind in needed]
        for kind, folder in zip(needed, folders, strict=True):
            missing = kind.entries.where(~folder.has(kind.entries.keys))
            if missing:
                raise ConfigError(
                    f"{folder.path}: {len(missing)} of {len(kind.entries)} {kind.name} are not in the cache, the first of "
                    f"{missing[0].photo.row.source}. {_others(root, kind)}Run `python -m idadapter_core cache build` with the run's "
                    "configuration, or set data.cache to '' to do without."
                )
        self._latents, self._photos = folders

    def latents(self, row: Row, mirrored: bool) -> Tensor:
        return self._latents.read(latents_key(row, mirrored))["moments"]

    def photo(self, photo: PhotoVariant) -> dict[str, Tensor]:
        tensors = self._photos.read(photo_key(photo))
        for name in ("crops", "heads"):
            if name in tensors:
                tensors[name] = _from_levels(tensors[name])
        return tensors


def _others(root: Path, kind: Kind) -> str:
    """Describe the other contents of a cache in which one kind is missing entirely."""
    if kind.folder(root).exists():
        return ""
    found = []
    for path in sorted(root.glob(f"{kind.name}-*/{FACTS}")):
        try:
            facts = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        other = [
            f"{name} {facts.get(name)}" for name, value in kind.facts.items() if facts.get(name) != value
        ]
        wanted = [f"{name} {value}" for name, value in kind.facts.items() if facts.get(name) != value]
        found.append(f"There are {kind.name} of {', '.join(other)}, but {', '.join(wanted)} is wanted. ")
    return "".join(found[:2])


def build(
    parts: Parts,
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]] = lambda name: nullcontext(
        _no_progress
    ),
) -> dict[str, int]:
    """Compute the missing entries and return their number per kind. Processes share the work.

    Args:
        progress: makes a context manager per kind; its value is a callback (done, total), in entries.
    """
    root = writable("data.cache", config.data.cache)
    written = {}
    for kind in kinds(parts, config):
        folder = kind.folder(root)
        write_file(folder / FACTS, json.dumps(kind.facts, indent=1).encode())
        present = Folder(folder)
        # Shared out before checking what exists: processes check at different times.
        share = kind.entries[rank::world]
        missing = share.where(~present.has(share.keys))
        with progress(kind.name) as report:
            for entries, tensors in _computed(kind, missing, parts, config, device, report):
                keys = json.dumps([entry.key for entry in entries])
                write_safetensors(tensors, {KEYS: keys}, folder / f"part-{entries[0].key}.safetensors")
        written[kind.name] = len(missing)
    return written


def _no_progress(done: int, total: int) -> None:
    pass


def verify(
    parts: Parts, config: RunConfig, count: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Recompute `count` entries of each kind. Returns the largest relative difference from the cache, infinite for NaN.

    Raises:
        ConfigError: an entry is missing.
    """
    needed = kinds(parts, config)
    root = Path(config.data.cache)
    Cache(root, needed)
    differences = {}
    for kind in needed:
        chosen = kind.entries[:: max(1, len(kind.entries) // count)][:count]
        folder = Folder(kind.folder(root))
        worst = 0.0
        for entries, tensors in _computed(kind, chosen, parts, config, device):
            for number, entry in enumerate(entries):
                for name, stored in folder.read(entry.key).items():
                    fresh = tensors[name][number].float()
                    scale = fresh.abs().max().clamp_min(1e-6)
                    difference = float((stored.float() - fresh).abs().max() / scale)
                    worst = max(worst, difference if difference == difference else float("inf"))
        differences[kind.name] = worst
    return differences


class _Pixels(Dataset["dict[str, Tensor] | IDAdapterError"]):
    """Dataset of network inputs, one item per entry, prepared in the loader's workers.

    For an unreadable photo, the item is an error object, as in `samples.Samples`.
    """

    def __init__(
        self,
        kind: Kind,
        entries: Sequence[Entry],
        index: Index,
        resolution: int,
        preprocess: Preprocess | None,
    ) -> None:
        self._kind, self._entries, self._index = kind.name, entries, index
        self._resolution, self._preprocess = resolution, preprocess

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> dict[str, Tensor] | IDAdapterError:
        entry = self._entries[number]
        row = entry.photo.row
        try:
            image = self._index.load(row)
        except IDAdapterError as error:
            return error
        if self._kind == "latents":
            return {"pictures": target_picture(image, row, self._resolution, entry.mirrored)}
        return photo_tensors(image, entry.photo, self._preprocess)


def _stacked(entries: Sequence[dict[str, Tensor] | IDAdapterError]) -> dict[str, Tensor]:
    for entry in entries:
        if isinstance(entry, IDAdapterError):
            raise entry
    whole = [entry for entry in entries if not isinstance(entry, IDAdapterError)]
    return {name: torch.stack([entry[name] for entry in whole]) for name in whole[0]}


def _computed(
    kind: Kind,
    entries: Sequence[Entry],
    parts: Parts,
    config: RunConfig,
    device: torch.device | str,
    progress: Callable[[int, int], None] = _no_progress,
) -> Iterator[tuple[list[Entry], dict[str, Tensor]]]:
    """Groups of entries, one per part, with their stacked tensors. A part ends when it is full or has taken `_LONGEST` seconds."""
    vision = parts.networks.vision
    pixels = _Pixels(
        kind, entries, parts.index, config.data.resolution, None if vision is None else vision.preprocess
    )
    size = max(1, _PIXELS // config.data.resolution**2) if kind.name == "latents" else _FACES
    loader = DataLoader(
        pixels,
        batch_size=size,
        num_workers=config.data.workers,
        collate_fn=list,
        worker_init_fn=prepare_worker,
    )
    group: list[dict[str, Tensor]] = []
    first = last = 0
    began = time.monotonic()
    with closing(Batches(loader, advice="The same command goes on with what is left to compute.")) as batches:
        for batch in batches:
            group.append(_compute(kind.name, _stacked(batch), parts, config, device))
            last += len(batch)
            progress(last, len(entries))
            if last - first >= PART or last == len(entries) or time.monotonic() - began > _LONGEST:
                joined = {name: torch.cat([tensors[name] for tensors in group]) for name in group[0]}
                yield list(entries[first:last]), joined
                first, group, began = last, [], time.monotonic()


@torch.no_grad()
def _compute(
    kind: str, batch: Mapping[str, Tensor], parts: Parts, config: RunConfig, device: torch.device | str
) -> dict[str, Tensor]:
    given = {name: tensor.to(device) for name, tensor in batch.items()}
    if kind == "latents":
        return {"moments": parts.base.vae.moments(given["pictures"]).half().cpu().contiguous()}
    needs = config.needs
    tensors = recognize(parts.networks.recognizer, given["crops"], needs)
    if not config.data.cache_features:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in STAGE_NAMES}
    if needs.stages and not config.data.cache_features:
        tensors["crops"] = _to_levels(given["crops"])
    if needs.vision is not None:
        assert parts.networks.vision is not None
        tensors |= (
            encode_heads(parts.networks.vision, given["heads"])
            if config.data.cache_features
            else {"heads": given["heads"].half()}
        )
    narrow = {name for name in tensors if name not in ("embedding", "crops")}
    return {name: (t.half() if name in narrow else t).cpu().contiguous() for name, t in tensors.items()}


def _to_levels(pixels: Tensor) -> Tensor:
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def _from_levels(levels: Tensor) -> Tensor:
    return levels.float() / 127.5 - 1 if levels.dtype == torch.uint8 else levels.float()
