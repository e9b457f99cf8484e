"""The node that says what is installed, what works and what is missing, and its self-test in the demo world."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..idadapter_core import Mix
from ..idadapter_core.demo_world.base import LATENT_CHANNELS, LATENT_SIDE
from ..idadapter_core.demo_world.portraits import draw_portraits
from ..idadapter_core.demo_world.shipped import METHODS
from ..idadapter_core.demo_world.world import CFG, RESCALED, SAMPLER, STEPS
from ..idadapter_core.doctor import FILES, Section, SelfTest, examine, self_tested, text_of
from ..idadapter_core.faces.features import extract_features
from ..idadapter_core.likeness import compare, mean_of, person_in
from ..idadapter_core.types import FaceFeatures
from .demo_world import LoadDemoWorld
from .host import images, model as host, paths
from .host.analyzer import LoadedAnalyzer
from .host.messages import Message, keeps_report, message_of, report_ui
from .host.plan import Rescale
from .host.text import encode_prompt
from .sockets import CATEGORY

TITLE = "ID Adapter Doctor"
PERSON, PHOTOS, PHOTO_SIZE = 5, 2, 256
PROMPTS = ("a photo of a {}", "a photo of a {} smiling at the beach", "a photo of a {} in a red shirt")


class Doctor(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterDoctor",
            display_name=TITLE,
            category=CATEGORY,
            description=(
                "Says which programs and model files are installed, which of them work, and which each method still lacks, with folder, "
                "page and licence. Downloads and changes nothing."
            ),
            search_aliases=[
                "diagnose",
                "check installation",
                "missing models",
                "what is wrong",
                "troubleshoot",
            ],
            inputs=[
                io.Boolean.Input(
                    "self_test",
                    default=False,
                    tooltip="Also draw a person of the demo world, with UniID and without, and measure the likeness: a few seconds.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The whole report: add it when you ask for help.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, self_test: bool) -> io.NodeOutput:
        files = paths.model_files()
        progress = comfy.utils.ProgressBar(
            len(files.adapters) + len(files.recognizers) + len(files.face_packages)
        )

        def step() -> None:
            progress.update(1)
            comfy.model_management.throw_exception_if_processing_interrupted()

        sections = examine(files, {"ComfyUI": paths.comfyui_version()}, step)
        if self_test:
            sections.append(self_tested(run_self_test))
        return io.NodeOutput(text_of(sections), ui=report_ui(_messages(sections)))

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return uuid.uuid4().hex  # programs and files may have changed since the last run


def _messages(sections: Sequence[Section]) -> list[Message]:
    """What to read on the node: warnings first, and the lists of files last; the report has the order in which things were looked at."""
    remarks = [(section.title == FILES, remark) for section in sections for remark in section.remarks]
    ordered = sorted(remarks, key=lambda entry: (not entry[1].is_warning, entry[0]))
    return [message_of(remark) for _, remark in ordered]


def run_self_test() -> SelfTest:
    """Draw a person of the demo world with the first of its adapters and without it, and compare the faces with the photos.

    Raises:
        IDAdapterError: a file or a program is missing or damaged.
    """
    begun = time.monotonic()
    method = next(iter(METHODS.values()))
    with torch.inference_mode():
        loaded = LoadDemoWorld.execute(method).result
        assert loaded is not None
        model, clip, vae, _, analyzer, adapter = loaded
        person, photos = draw_portraits(PERSON, PHOTOS, PHOTO_SIZE)
        features = _features(analyzer, torch.from_numpy(photos).float() / 255)
        identity = adapter.encode(features, Mix())
        applied, _ = host.apply(model, adapter, identity)
        rescaled = host.rescaled(applied, Rescale(RESCALED, False, False, "normalized", None))
        wanted = person_in(features)
        texts = [prompt.format(person.sex) for prompt in PROMPTS]
        negative = _encoded(clip, "")

        def likeness(model: Any, positives: list[Any]) -> float:
            pictures = [_draw(model, vae, one, negative, seed) for seed, one in enumerate(positives)]
            return mean_of([compare(wanted, analyzer.features_in(picture))[0] for picture in pictures])

        with_adapter = likeness(rescaled, [encode_prompt(clip, text, identity, 1.0) for text in texts])
        without = likeness(model, [_encoded(clip, text) for text in texts])
    return SelfTest(method, with_adapter, without, time.monotonic() - begun)


def _features(analyzer: LoadedAnalyzer, pictures: Tensor) -> FaceFeatures:
    """Describe the largest face of each picture (B, H, W, 3), RGB in 0..1."""
    return extract_features(
        images.photos(pictures),
        analyzer.analyzer,
        analyzer.recognize,
        recognizer_digest=analyzer.recognizer_digest,
    ).features


def _encoded(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _draw(model: Any, vae: Any, positive: Any, negative: Any, seed: int) -> Tensor:
    """Draw a picture (H, W, 3), RGB in 0..1."""
    latents = torch.zeros(1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    noise = comfy.sample.prepare_noise(latents, seed)
    drawn = comfy.sample.sample(
        model, noise, STEPS, CFG, SAMPLER, "simple", positive, negative, latents, seed=seed, disable_pbar=True
    )
    picture: Tensor = vae.decode(drawn)[0]
    return picture
