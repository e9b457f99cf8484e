"""Load the inputs of a run: frozen networks, index and adapter."""

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
from .adapters import AdapterRequirements, fresh_adapter, load_start
from .config import RunConfig
from .samples import usable_rows


@dataclass(frozen=True, eq=False)
class Parts:
    """Frozen networks and the photo index."""

    base: Base
    networks: Networks
    recognizer_digest: str  # as recorded in the adapter's file
    index: Index
    train_rows: Sequence[Row]
    test_rows: Sequence[Row]


def require_files(config: RunConfig, *others: str) -> None:
    """Check that all input files exist, before anything is loaded.

    Args:
        others: further settings of `data` whose paths must exist.

    Raises:
        ConfigError: names the first missing one.
    """
    without = [] if _needs_detector(config) else ["face_package"]
    without += ["vision"] if config.needs.vision is None else []
    named = {f"data.{name}": getattr(config.data, name) for name in ("index", *others)}
    require_paths(config.base, without, {**named, "adapter.start": config.adapter.start})


def _needs_detector(config: RunConfig) -> bool:
    return config.loss.identity > 0 and "detector" in (config.loss.gate, config.loss.align)


def load_parts(config: RunConfig, device: torch.device | str = "cpu") -> Parts:
    """Load the networks and the index of a configuration.

    Raises:
        ConfigError: a setting is missing, a file does not exist, or they do not fit together.
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
    """The adapter to train: from a checkpoint, from the file given by `adapter.start`, or a new one."""
    section = config.adapter
    vision = parts.networks.vision
    wanted = AdapterRequirements(
        section.method,
        text_widths=parts.base.text.widths,
        vision=None if vision is None else (vision.width, vision.patches),
        recognizer=parts.recognizer_digest,
        stage_widths=parts.networks.recognizer.widths,
        branch=section.branch,
        settings=_settings(config),
    )
    start = checkpoint or (Path(section.start) if section.start else None)
    if start is not None:
        return load_start(start, parts.base.unet, wanted)
    return fresh_adapter(parts.base.unet, wanted, config.train.seed)


def _settings(config: RunConfig) -> dict[str, Any]:
    """The adapter's settings. The number of references of an IDAdapter comes from the data settings."""
    settings = dict(config.adapter.settings)
    if not hasattr(config.method.config(), "references"):
        return settings
    references = config.data.references
    if settings.setdefault("references", references) != references:
        raise ConfigError(
            f"adapter.settings.references is {settings['references']}, data.references is {references}; leave the first one out"
        )
    return settings
