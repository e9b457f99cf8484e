"""IDAdapter: mixed facial features of N references, gated adapters, an identity word in the prompt (arXiv 2403.13535).

No weights were ever published, so names and layout are ours. The sizes follow the paper: with the `sd21` preset the mixer, the
gated adapters and the K/V weights have 261.96 M parameters (paper: 262 M). The gated adapters have the shapes of GLIGEN's gated
self-attention (arXiv 2301.07093), which the paper adopts.
"""

from __future__ import annotations

from ..method import Method
from . import config, encoder
from .config import PRESETS, IDAdapterConfig
from .encoder import (
    FeatureMixer,
    IDAdapterEncoder,
    IDAdapterLayers,
    WordProjection,
    face_feature,
    parameter_counts,
)
from .files import FILES, PUBLISHED
from .recipe import RECIPE

METHOD = Method(
    name=encoder.NAME,
    title="IDAdapter",
    config=IDAdapterConfig,
    presets=PRESETS,
    needs=config.needs,
    mechanisms=encoder.mechanisms,
    encoder=IDAdapterEncoder,
    layers=IDAdapterLayers,
    initialise=encoder.initialise,
    require=encoder.require_vision,
    encode=encoder.encode,
    files=FILES,
    text="word",
    describe=config.describe,
    notes=config.notes,
    parameters=parameter_counts,
    references=lambda sizes: sizes.references,
    usual_rescale=lambda sizes: None,
    recipe=RECIPE,
    weighs_tokens=True,
    published=PUBLISHED,
)

__all__ = [
    "METHOD",
    "PRESETS",
    "FeatureMixer",
    "IDAdapterConfig",
    "IDAdapterEncoder",
    "IDAdapterLayers",
    "WordProjection",
    "face_feature",
    "parameter_counts",
]
