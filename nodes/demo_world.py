"""The nodes of the demo world: its models, and photos of people who do not exist."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..idadapter_core.demo_world.portraits import draw_portraits
from ..idadapter_core.demo_world.render import MAX_SIZE
from ..idadapter_core.demo_world.shipped import (
    ASSETS,
    AUTOENCODER,
    BASE,
    DETECTOR_FILE,
    METHODS,
    PACKAGE,
    RECOGNIZER_FILE,
    SEX_AND_AGE_FILE,
    VISION_CONFIG,
    VISION_WEIGHTS,
    adapter_file,
    face_package,
    shipped,
)
from ..idadapter_core.errors import InputError
from ..idadapter_core.faces.detector import open_analyzer
from .adapter import load
from .host import paths
from .host.analyzer import LoadedAnalyzer, load_recognizer
from .host.demo_world import open_base, open_vision
from .sockets import CATEGORY, AdapterSocket, FaceAnalyzerSocket

LOADER = "Load Demo World"
SHARED = (
    BASE,
    AUTOENCODER,
    VISION_CONFIG,
    VISION_WEIGHTS,
    *(f"{PACKAGE}/{name}" for name in (DETECTOR_FILE, RECOGNIZER_FILE, SEX_AND_AGE_FILE)),
)
"""Names of the files that are read for every method."""


class LoadDemoWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterLoadDemoWorld",
            display_name=LOADER,
            category=CATEGORY,
            description=(
                "Loads everything to try this pack with, from files of the pack itself: a small model that draws people who do not exist "
                "(128 x 128 pixels, seconds on a CPU), face networks that know them, and adapters trained for it."
            ),
            search_aliases=["demo", "example", "test model", "people who do not exist", "try idadapter"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=list(METHODS.values()),
                    tooltip="The method whose adapter is loaded. IDAdapter also needs clip_vision at Extract Face Features.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="Draws at 128 x 128, with the sampler lcm, scheduler simple, 8 steps and a CFG of 3.",
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
        method = next((name for name, title in METHODS.items() if title == adapter), None)
        if method is None:
            raise InputError(
                f"{LOADER} has adapters of {', '.join(METHODS.values())}, got {adapter!r}. Choose from the list."
            )
        for name in SHARED:  # what a face package lacks is told as of one that the user chose
            shipped(name)
        parts = open_base(shipped(BASE), shipped(AUTOENCODER))
        package = face_package()
        recognizer, digest = load_recognizer(package / RECOGNIZER_FILE, any_layers=True)
        analyzer = LoadedAnalyzer(open_analyzer(package, "cpu"), recognizer, digest)
        vision = open_vision(shipped(VISION_CONFIG), shipped(VISION_WEIGHTS))
        loaded = load(shipped(adapter_file(method)), None)
        return io.NodeOutput(*parts, vision, analyzer, loaded)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return paths.stamp(*(ASSETS / name for name in (*SHARED, *map(adapter_file, METHODS))))


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
                    tooltip="How many photos of the person. IDAdapter was trained with four; UniID takes any number.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=128,
                    max=MAX_SIZE,
                    step=64,
                    tooltip="Width and height of each photo in pixels. A photo of 512 takes a second or two.",
                ),
            ],
            outputs=[
                io.Image.Output("photos", display_name="photos", tooltip="For Extract Face Features."),
                io.String.Output("person", display_name="person", tooltip="woman or man."),
            ],
        )

    @classmethod
    def execute(cls, person: int, photos: int, size: int) -> io.NodeOutput:
        progress = comfy.utils.ProgressBar(photos)

        def drawn() -> None:
            progress.update(1)
            comfy.model_management.throw_exception_if_processing_interrupted()

        shown, pixels = draw_portraits(person, photos, size, drawn)
        return io.NodeOutput(torch.from_numpy(pixels).float() / 255, shown.sex)
