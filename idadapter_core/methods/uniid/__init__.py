"""UniID: a text branch and an adapter branch, trained for identity only, merged at inference (arXiv 2512.03964).

Module and key names follow the published code (lyuPang/UniID@41cd236), so its checkpoints load without conversion.
"""

from __future__ import annotations

from ...mechanisms.decoupled import SiteProjections
from ..method import Method
from . import config, encoder
from .config import UniIDConfig
from .encoder import AdapterBranch, TextBranch, UniIDEncoder
from .files import FILES, PUBLISHED
from .recipe import RECIPE

METHOD = Method(
    name=encoder.NAME,
    title="UniID",
    config=UniIDConfig,
    presets={},
    needs=config.needs,
    mechanisms=encoder.mechanisms,
    encoder=UniIDEncoder,
    layers=lambda sizes, operations: encoder.layers(sizes),
    initialise=encoder.initialise,
    require=encoder.require_stages,
    encode=encoder.encode,
    files=FILES,
    text="states",
    describe=config.describe,
    notes=config.notes,
    parameters=lambda sizes: {},
    references=lambda sizes: 0,
    usual_rescale=config.usual_rescale,
    dial=config.DIAL,
    recipe=RECIPE,
    published=PUBLISHED,
)

__all__ = ["METHOD", "AdapterBranch", "SiteProjections", "TextBranch", "UniIDConfig", "UniIDEncoder"]
