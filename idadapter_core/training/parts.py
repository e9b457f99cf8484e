"""What a run needs from disk, beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..data.index import Index, read_index
from ..data.rows import Row
from ..errors import ConfigError
from ..stable_diffusion.base import Base, load_base
from ..stable_diffusion.config import require_paths
from ..stable_diffusion.networks import Networks, load_networks
from .adapters import Wanted, fresh_adapter, load_start
from .config import RunConfig
from .samples import usable_rows


@dataclass(frozen=True, eq=False)
class Parts:
    """Frozen networks and the index of photos."""

    base: Base
    networks: Networks
    recognizer_digest: str  # as the adapter's file records it
    index: Index
    train_rows: Sequence[Row]
    test_rows: Sequence[Row]


def require_files(config: RunConfig, *others: str) -> None:
    """See that what a run reads is there, before anything is loaded.

    Args:
        others: settings of `data` that name something else that must be there.

    Raises:
        ConfigError: names the first that is not.
    """
    without = [] if _needs_detector(config) else ["face_package"]
    without += ["vision"] if config.needs.vision is None else []
    named = {f"data.{name}": getattr(config.data, name) for name in ("index", *others)}
    require_paths(config.base, without, {**named, "adapter.start": config.adapter.start})


def _needs_detector(config: RunConfig) -> bool:
    return config.loss.identity > 0 and "detector" in (config.loss.gate, config.loss.align)


def load_parts(config: RunConfig, device: torch.device | str = "cpu") -> Parts:
    """Everything that a configuration names.

    Raises:
        ConfigError: something is not named, not there, or does not fit.
    """
    if not config.data.index:
        raise ConfigError(
            "data.index is empty; make an index with `python -m idadapter_core scan` and name it there"
        )
    index = read_index(Path(config.data.index))
    train_rows, test_rows = usable_rows(index, config, "train"), usable_rows(index, config, "test")
    networks, digest = load_networks(config.base, config.needs, _needs_detector(config))
    dtype = torch.bfloat16 if config.train.mixed_precision == "bf16" else torch.float32
    base = load_base(config.base, device, dtype)
    networks.recognizer.to(device)
    if networks.vision is not None:
        networks.vision.to(device)
    return Parts(base, networks, digest, index, train_rows, test_rows)


def prepare_adapter(config: RunConfig, parts: Parts, checkpoint: Path | None = None) -> Adapter:
    """The adapter that a run trains: of a checkpoint of it, of the file it starts from, or a fresh one."""
    section = config.adapter
    vision = parts.networks.vision
    wanted = Wanted(
        section.method,
        text_widths=parts.base.text.widths,
        vision=None if vision is None else (vision.width, vision.patches),
        recognizer=parts.recognizer_digest,
        branch=section.branch,
        settings=_settings(config),
    )
    start = checkpoint or (Path(section.start) if section.start else None)
    if start is not None:
        return load_start(start, parts.base.unet, wanted)
    return fresh_adapter(parts.base.unet, wanted, config.train.seed)


def _settings(config: RunConfig) -> dict[str, Any]:
    """The adapter's settings; how many references an IDAdapter learns from is the data's."""
    settings = dict(config.adapter.settings)
    if not hasattr(config.method.config(), "references"):
        return settings
    references = config.data.references
    if settings.setdefault("references", references) != references:
        raise ConfigError(
            f"adapter.settings.references is {settings['references']}, data.references is {references}; leave the first one out"
        )
    return settings
