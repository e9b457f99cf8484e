"""The pack's nodes: thin wrappers that unpack their inputs, make one call and return the result."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from ..idadapter_core.doctor import summary
from .adapter import ApplyIDAdapter, LoadIDAdapter, NormalizedRescaling
from .demo_world import DemoPerson, LoadDemoWorld
from .doctor import Doctor
from .faces import EnrichPhotos, ExtractFaces, LoadFaceAnalyzer
from .host import exceptions, graph, paths
from .host.numbers import checks_numbers
from .identity import AttachIdentity, LoadIdentity, MergeIdentities, MixFeatures, SaveIdentity
from .personalize import FaceIdentity
from .prompt import IDPrompt
from .regions import FaceMasks
from .report import IdentityReport

log = logging.getLogger(__name__)

NODES: tuple[type[io.ComfyNode], ...] = tuple(
    checks_numbers(node)
    for node in (
        LoadFaceAnalyzer,
        ExtractFaces,
        EnrichPhotos,
        LoadIDAdapter,
        MixFeatures,
        ApplyIDAdapter,
        NormalizedRescaling,
        IDPrompt,
        AttachIdentity,
        SaveIdentity,
        LoadIdentity,
        LoadDemoWorld,
        DemoPerson,
        Doctor,
        IdentityReport,
        MergeIdentities,
        FaceMasks,
        FaceIdentity,
    )
)


class IDAdapterExtension(ComfyExtension):
    async def on_load(self) -> None:
        paths.register()
        graph.register()
        exceptions.use_short_names()
        log.info("%s", summary(paths.own_files()))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


__all__ = ["IDAdapterExtension"]
