"""The nodes of the demo world: its models, and photos of people who do not exist."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from comfy_api.latest import io

from ..idadapter_core.demo_world.portraits import LARGEST, draw_portraits
from ..idadapter_core.demo_world.shipped import (
    ADAPTERS,
    ASSETS,
    AUTOENCODER,
    BASE,
    CLIP_VISION,
    RECOGNIZER_FILE,
    face_package,
    shipped,
)
from ..idadapter_core.faces.detector import open_analyzer
from .adapter import load
from .faces import LoadedAnalyzer, load_recognizer
from .host import paths
from .host.demo_world import open_base, open_vision
from .sockets import CATEGORY, AdapterSocket, FaceAnalyzerSocket

FILES = MappingProxyType(
    {
        "UniID": "uniid.safetensors",
        "IDAdapter": "idadapter.safetensors",
        "IP-Adapter FaceID": "faceid.safetensors",
    }
)


class LoadDemoWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterLoadDemoWorld",
            display_name="Load Demo World",
            category=CATEGORY,
            description=(
                "Loads everything to try this pack with, from files of the pack itself: a small model that draws people who do not exist "
                "(128 x 128 pixels, seconds on a CPU), face networks that know them, and adapters trained for it."
            ),
            search_aliases=["demo", "example", "test model", "people who do not exist", "try idadapter"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=list(FILES),
                    tooltip="The method whose adapter is loaded. IDAdapter also needs clip_vision at Extract Face Features.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="Draws at 128 x 128, with 20 steps and a CFG of about 3.",
                ),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="Knows the words of this world: styles, expressions, directions, clothes, accessories, backgrounds.",
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="For VAE Decode and VAE Encode."),
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="clip_vision",
                    tooltip="For Extract Face Features, with IDAdapter only.",
                ),
                FaceAnalyzerSocket.Output(
                    "analyzer", display_name="analyzer", tooltip="For Extract Face Features."
                ),
                AdapterSocket.Output(
                    "adapter", display_name="adapter", tooltip="For Mix Face Features and Apply ID Adapter."
                ),
            ],
        )

    @classmethod
    def execute(cls, adapter: str) -> io.NodeOutput:
        parts = open_base(shipped(BASE), shipped(AUTOENCODER))
        package = face_package()
        recognizer, digest = load_recognizer(package / RECOGNIZER_FILE, any_layers=True)
        analyzer = LoadedAnalyzer(open_analyzer(package, "cpu"), recognizer, digest)
        vision = open_vision(shipped(CLIP_VISION))
        loaded = load(shipped(f"{ADAPTERS}/{FILES[adapter]}"), None)
        return io.NodeOutput(*parts, vision, analyzer, loaded)

    @classmethod
    def fingerprint_inputs(cls, adapter: str | None, **_: Any) -> str:
        names = [] if adapter is None else [f"{ADAPTERS}/{FILES[adapter]}"]
        return paths.stamp(*(ASSETS / name for name in (BASE, AUTOENCODER, *names)))


class DemoPerson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterDemoPerson",
            display_name="Draw Demo Person",
            category=CATEGORY,
            description=(
                "Draws photos of a person who does not exist, to try this pack without a photo of your own. Each has another expression, "
                "direction and background. Only the demo world's face networks know these people."
            ),
            search_aliases=["demo photo", "example person", "synthetic face", "test photo"],
            inputs=[
                io.Int.Input(
                    "person",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Another number, another person. The same number always gives the same photos.",
                ),
                io.Int.Input(
                    "photos",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="How many photos of the person. IDAdapter was trained with four; UniID gains from each.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=128,
                    max=LARGEST,
                    step=64,
                    tooltip="Width and height of each photo in pixels. About a second for each photo at 512.",
                ),
            ],
            outputs=[
                io.Image.Output("photos", display_name="photos", tooltip="For Extract Face Features."),
                io.String.Output("person", display_name="person", tooltip="woman or man."),
            ],
        )

    @classmethod
    def execute(cls, person: int, photos: int, size: int) -> io.NodeOutput:
        drawn, pictures = draw_portraits(person, photos, size)
        return io.NodeOutput(torch.from_numpy(pictures.pixels).float() / 255, drawn.sex)
