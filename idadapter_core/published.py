"""Files that others published and methods need: where each belongs, who has it, and under which licence.

Facts only. Nothing here downloads anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Folders below ComfyUI's `models`, and subfolders of the first.
ADAPTERS, CHECKPOINTS, CLIP_VISION, INSIGHTFACE = "idadapter", "checkpoints", "clip_vision", "insightface"
RECOGNIZERS, IDENTITIES = "recognizers", "identities"

Role = Literal["checkpoint", "adapter", "text_branch", "recognizer", "face_package", "clip_vision"]

RESEARCH_ONLY = "non-commercial research only"
SEE_PAGE = "see its page"


@dataclass(frozen=True)
class PublishedFile:
    """A file, or a folder of files, that a method needs.

    name: usual name on disk; files are recognised by their contents.
    folder: below ComfyUI's `models`.
    page: address of the page that has it, or a file of this project that says how to make it.
    """

    role: Role
    name: str
    folder: str
    page: str
    licence: str


BUFFALO_L = PublishedFile(
    "face_package",
    "buffalo_l, unpacked",
    f"{INSIGHTFACE}/models/buffalo_l",
    "github.com/deepinsight/insightface/releases",
    RESEARCH_ONLY,
)
GLINT360K_R100 = PublishedFile(
    "recognizer",
    "iresnet100_glint360k.pth (backbone.pth there)",
    f"{ADAPTERS}/{RECOGNIZERS}",
    "arcface_torch of github.com/deepinsight/insightface, Glint360K R100",
    RESEARCH_ONLY,
)
CLIP_VIT_L = PublishedFile(
    "clip_vision",
    "clip-vit-large-patch14.safetensors",
    CLIP_VISION,
    "huggingface.co/openai/clip-vit-large-patch14",
    SEE_PAGE,
)
SDXL = PublishedFile(
    "checkpoint",
    "RealVisXL_V5.0_fp16.safetensors, or another SDXL checkpoint",
    CHECKPOINTS,
    "huggingface.co/SG161222/RealVisXL_V5.0",
    SEE_PAGE,
)
SD15_OR_SDXL = PublishedFile(
    "checkpoint", "an SD1.5 or SDXL checkpoint, as the adapter is for", CHECKPOINTS, "its own page", SEE_PAGE
)
