"""Files that others published and methods need: where each belongs, who has it, and under which licence.

Facts only. Nothing here downloads anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# Folders below ComfyUI's `models`, and subfolders of the first.
ADAPTERS, CHECKPOINTS, CLIP_VISION, INSIGHTFACE = "idadapter", "checkpoints", "clip_vision", "insightface"
RECOGNIZERS, IDENTITIES = "recognizers", "identities"

Role = Literal[
    "checkpoint", "adapter", "text_branch", "recognizer", "detector", "face_package", "clip_vision"
]

RESEARCH_ONLY = "non-commercial research only"
SEE_PAGE = "see its page"


@dataclass(frozen=True)
class PublishedFile:
    """A file, or a folder of files, that a method needs.

    name: usual name on disk; files are recognised by their contents.
    folder: below ComfyUI's `models`.
    page: address of the page that has it, or a file of this project that says how to make it.
    families: UNet families of a checkpoint that fit; width: that of a CLIP vision model that fits. A face package needs a recogniser, a
    detector does not.
    """

    role: Role
    name: str
    folder: str
    page: str
    licence: str
    families: tuple[str, ...] = ()
    width: int = 0


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
    width=1024,
)
SDXL = PublishedFile(
    "checkpoint",
    "RealVisXL_V5.0_fp16.safetensors, or another SDXL checkpoint",
    CHECKPOINTS,
    "huggingface.co/SG161222/RealVisXL_V5.0",
    SEE_PAGE,
    ("SDXL",),
)
SD15_OR_SDXL = PublishedFile(
    "checkpoint",
    "an SD1.5 or SDXL checkpoint, as the adapter is for",
    CHECKPOINTS,
    "its own page",
    SEE_PAGE,
    ("SD1.5", "SDXL"),
)
DETECTOR = replace(BUFFALO_L, role="detector")


@dataclass(frozen=True)
class Download:
    """A file with a public address. See `fetch`.

    target: file below `models`; of an archive (.zip), the folder that its members go to.
    """

    name: str  # on the command line
    url: str
    size: int  # bytes; 0: as the server says
    sha256: str
    target: str
    page: str
    licence: str
    is_archive: bool = False


_RELEASE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_FACEID = "https://huggingface.co/h94/IP-Adapter-FaceID/resolve/main"
DOWNLOADS = {
    download.name: download
    for download in (
        Download(
            "buffalo_l",
            f"{_RELEASE}/buffalo_l.zip",
            288_621_354,
            "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
            f"{INSIGHTFACE}/models/buffalo_l",
            "github.com/deepinsight/insightface/releases",
            RESEARCH_ONLY,
            is_archive=True,
        ),
        Download(
            "antelopev2",
            f"{_RELEASE}/antelopev2.zip",
            360_662_982,
            "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
            f"{INSIGHTFACE}/models/antelopev2",
            "github.com/deepinsight/insightface/releases",
            RESEARCH_ONLY,
            is_archive=True,
        ),
        Download(
            "faceid_sdxl",
            f"{_FACEID}/ip-adapter-faceid_sdxl.bin",
            0,
            "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",
            f"{ADAPTERS}/ip-adapter-faceid_sdxl.bin",
            "huggingface.co/h94/IP-Adapter-FaceID",
            RESEARCH_ONLY,
        ),
        Download(
            "faceid_sd15",
            f"{_FACEID}/ip-adapter-faceid_sd15.bin",
            96_740_574,
            "201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7",
            f"{ADAPTERS}/ip-adapter-faceid_sd15.bin",
            "huggingface.co/h94/IP-Adapter-FaceID",
            RESEARCH_ONLY,
        ),
    )
}
