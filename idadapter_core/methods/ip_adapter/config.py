"""Sizes, requirements and description of an IP-Adapter FaceID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from ...mechanisms import Mechanisms
from ...sites import family_name
from ..method import Needs

_SDXL_WIDTHS = (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10


@dataclass(frozen=True)
class FaceIDConfig:
    """Sizes of one adapter. The defaults match ip-adapter-faceid_sdxl."""

    tokens: int = 4
    embedding_width: int = 512
    hidden_width: int = 1024  # hidden width of the MLP from the embedding to the tokens
    context_width: int = 2048  # text width of the UNet
    site_widths: tuple[int, ...] = _SDXL_WIDTHS  # in checkpoint order
    lora_rank: int = 128  # rank of the attention LoRA in the file; 0: none (Portrait)
    recognizer: str = ""  # digest of the face network used in training; empty: not recorded

    non_weight_settings: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "embedding_width", "hidden_width", "context_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.site_widths or any(width < 1 for width in self.site_widths):
            raise InputError(f"site_widths must be at least 1 each, got {self.site_widths}")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank must be at least 0, got {self.lora_rank}")

    @property
    def has_text_branch(self) -> bool:
        return False

    @property
    def has_adapter_branch(self) -> bool:
        return True


def needs(config: FaceIDConfig) -> Needs:
    """Require the embedding alone."""
    return Needs()


def describe(config: FaceIDConfig) -> list[str]:
    """Describe an adapter of these sizes, in lines."""
    kind = f"with a LoRA of rank {config.lora_rank}" if config.lora_rank else "without a LoRA (Portrait)"
    recognizer = (
        config.recognizer or "not recorded in the file (the published ones use buffalo_l's w600k_r50)"
    )
    return [
        kind,
        f"for {family_name(len(config.site_widths), config.context_width)}; {config.tokens} adapter tokens",
        f"face recogniser: {recognizer}",
        "licence: the published weights are for non-commercial research only, as insightface's packages are",
    ]


def notes(config: FaceIDConfig, mechanisms: Mechanisms) -> tuple[str, ...]:
    """Note that the LoRA in the file is active, so that the user does not load a second copy of it."""
    if not config.lora_rank:
        return ()
    return (
        "its LoRA is in this file and acts with the adapter; do not load the published LoRA file beside it, which would apply it twice.",
    )
