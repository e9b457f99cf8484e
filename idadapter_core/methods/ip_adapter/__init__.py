"""IP-Adapter FaceID: tokens of a face embedding in decoupled attention, and a LoRA in the same file (tencent-ailab/IP-Adapter)."""

from __future__ import annotations

from ..method import Method
from . import config, encoder
from .config import FaceIDConfig
from .encoder import FaceIDEncoder, FaceIDLayers
from .files import FILES, PUBLISHED
from .recipe import RECIPE

METHOD = Method(
    name=encoder.NAME,
    title="IP-Adapter FaceID",
    config=FaceIDConfig,
    presets={},
    needs=config.needs,
    mechanisms=encoder.mechanisms,
    encoder=FaceIDEncoder,
    layers=lambda sizes, operations: FaceIDLayers(sizes),
    initialise=encoder.initialise,
    require=encoder.require_embedding,
    encode=encoder.encode,
    files=FILES,
    text=None,
    describe=config.describe,
    notes=config.notes,
    parameters=lambda sizes: {},
    references=lambda sizes: 0,
    usual_rescale=lambda sizes: None,
    recipe=RECIPE,
    published=PUBLISHED,
)

__all__ = ["METHOD", "FaceIDConfig", "FaceIDEncoder", "FaceIDLayers"]
