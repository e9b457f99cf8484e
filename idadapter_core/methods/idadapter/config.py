"""Sizes, requirements and description of an IDAdapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from ...mechanisms import Mechanisms
from ...mechanisms.text import ENCODERS
from ...sites import family_name
from ..method import UNCONDITIONAL, Needs

_SD_WIDTHS = (320,) * 2 + (640,) * 2 + (1280,) * 2 + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
_SDXL_WIDTHS = (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10


def _heads_of_64(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(width // 64 for width in widths)


@dataclass(frozen=True)
class IDAdapterConfig:
    """Sizes of one IDAdapter. The defaults are the paper's: SD2.1, CLIP ViT-L/14, four references."""

    references: int = 4  # N, photos per person in training
    vision_width: int = 1024  # width of the CLIP vision model, the mixer and E_r
    vision_patches: int = 256  # patch tokens per photo
    embedding_width: int = 512
    mixer_depth: int = 2  # attention blocks of MFF; 0 leaves the features unmixed
    mixer_heads: int = 16
    tokens: int = 0  # length of E_r: 0 for all (N * patches + 1), else resampled to this many
    resampler_depth: int = 2  # depth of the resampler, if tokens > 0
    text_encoders: tuple[str, ...] = (
        "h",
    )  # by ComfyUI's names: l and g (SD1.5, SDXL), h (SD2.1); empty: no identity word
    text_widths: tuple[int, ...] = (1024,)
    text_tokens: int = 1  # embeddings of the identity word
    text_hidden: int = 1024
    context_width: int = 1024  # text width of the UNet
    site_widths: tuple[int, ...] = _SD_WIDTHS  # in checkpoint order
    site_heads: tuple[int, ...] = _heads_of_64(_SD_WIDTHS)
    unconditional: str = "skip"  # on negative rows: skip the adapter, or use tokens of zeroed features
    recognizer: str = ""  # digest of the face network used in training; empty: not recorded

    # Settings that affect an identity, or its use, but no weight.
    non_weight_settings: ClassVar[tuple[str, ...]] = (
        "references",
        "mixer_heads",
        "site_heads",
        "text_encoders",
        "unconditional",
    )

    def __post_init__(self) -> None:
        sizes = (
            "references",
            "vision_width",
            "vision_patches",
            "embedding_width",
            "mixer_heads",
            "context_width",
        )
        counts = ("mixer_depth", "tokens", "resampler_depth")
        for least, names in ((1, sizes), (0, counts)):
            for name in names:
                if getattr(self, name) < least:
                    raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tokens and not self.resampler_depth:
            raise InputError(
                f"resampler_depth must be at least 1 where E_r is resampled (to {self.tokens} tokens), got 0: the tokens would "
                "not depend on the photos"
            )
        if len(self.text_encoders) != len(self.text_widths):
            raise InputError(
                f"text_encoders {self.text_encoders} and text_widths {self.text_widths} must be as many"
            )
        if len(set(self.text_encoders)) < len(self.text_encoders) or set(self.text_encoders) - set(ENCODERS):
            raise InputError(
                f"text_encoders must be different ones of {', '.join(ENCODERS)}, got {self.text_encoders}"
            )
        for name in ("text_tokens", "text_hidden"):
            if self.text_encoders and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_widths", "site_widths"):
            if any(width < 1 for width in getattr(self, name)):
                raise InputError(f"{name} must be at least 1 each, got {getattr(self, name)}")
        if not self.site_widths or len(self.site_widths) != len(self.site_heads):
            raise InputError(
                f"site_widths ({len(self.site_widths)}) and site_heads ({len(self.site_heads)}) must be as many, at least one"
            )
        for width, heads in (
            (self.vision_width, self.mixer_heads),
            *zip(self.site_widths, self.site_heads, strict=True),
        ):
            if heads < 1 or width % heads:
                raise InputError(f"width {width} must be divisible by its number of heads, got {heads}")
        if self.unconditional not in UNCONDITIONAL:
            raise InputError(
                f"unconditional must be one of {', '.join(UNCONDITIONAL)}, got {self.unconditional!r}"
            )

    @property
    def has_text_branch(self) -> bool:
        return bool(self.text_encoders)

    @property
    def has_adapter_branch(self) -> bool:
        return True


PRESETS = {
    "sd15": IDAdapterConfig(
        text_encoders=("l",), text_widths=(768,), context_width=768, site_heads=(8,) * len(_SD_WIDTHS)
    ),
    "sd21": IDAdapterConfig(),
    "sdxl": IDAdapterConfig(
        text_encoders=("l", "g"),
        text_widths=(768, 1280),
        context_width=2048,
        site_widths=_SDXL_WIDTHS,
        site_heads=_heads_of_64(_SDXL_WIDTHS),
    ),
}


def needs(config: IDAdapterConfig) -> Needs:
    """Return the required CLIP vision size, and the text encoders of the identity word."""
    widths = dict(zip(config.text_encoders, config.text_widths, strict=True))
    return Needs(vision=(config.vision_width, config.vision_patches), text_widths=widths)


def describe(config: IDAdapterConfig) -> list[str]:
    """Describe an adapter of these sizes, in lines."""
    all_tokens = config.references * config.vision_patches + 1
    kept = f"resampled to {config.tokens}" if config.tokens else f"up to {all_tokens}, all kept"
    lines = [
        f"N = {config.references} references",
        f"for {family_name(len(config.site_widths), config.context_width)}; identity tokens: {kept}",
        f"CLIP vision of width {config.vision_width} with {config.vision_patches} patches",
    ]
    if config.has_text_branch:
        widths = ", ".join(
            f"{name} {width}" for name, width in zip(config.text_encoders, config.text_widths, strict=True)
        )
        embeddings = f"{config.text_tokens} embedding{'s' if config.text_tokens > 1 else ''}"
        lines.append(f"identity word ({embeddings}) for the text encoders {widths}")
    else:
        lines.append("no identity word")
    negative = (
        "without the adapters" if config.unconditional == "skip" else "with the tokens of zeroed features"
    )
    lines.append(f"negative prompts: {negative}")
    unknown = (
        "not recorded in the file; use the very face package it was trained with, others draw somebody else"
    )
    return [*lines, f"face recogniser: {config.recognizer or unknown}"]


def notes(config: IDAdapterConfig, mechanisms: Mechanisms) -> tuple[str, ...]:
    """Return a note if the adapter was never trained."""
    if mechanisms.deltas or any(map(any, mechanisms.openings.values())):
        return ()
    return (
        "it is untrained: all gates are closed and no K/V weights changed, so Apply ID Adapter leaves the model as it is. "
        "It is the start of a training; choose a trained file to put a person into pictures.",
    )
