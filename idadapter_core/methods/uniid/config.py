"""Sizes, requirements and description of a UniID adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from ...faces.iresnet import STAGE_WIDTHS
from ...mechanisms import Mechanisms
from ...schedule import RescaleSchedule
from ...sites import family_name
from ...strength import Dial
from ..method import Needs

ENCODERS = ("l", "g")  # supported text encoders, in the order of SDXL's concatenated states
FUSED_SIDE = 16  # stages 1-3 are resized to 16 x 16 before they are fused
# The sizes in UniIDConfig that define each branch, besides `head_width`.
TEXT_SIZES = ("text_widths", "text_tokens", "text_depth", "text_hidden", "embedding_width")
ADAPTER_SIZES = ("adapter_tokens", "adapter_width", "adapter_depth", "context_width", "site_widths")

DIAL = Dial(((0.0, 0.0), (0.48, 0.28), (0.74, 0.44), (0.9, 0.67), (1.0, 1.0), (2.0, 1.33)))
"""Measured in the demo world (docs/claims.md, the front): with a strength up to 1, the share of pictures nearer to the person than to somebody
of the same look grows evenly from that of the plain model to that of the usual scales. Beyond, likeness gains little and the prompt pays; 2 is
the most that was measured."""


@dataclass(frozen=True)
class UniIDConfig:
    """Sizes of one UniID adapter. The defaults are the published ones (SDXL). Either branch may be absent."""

    text_widths: tuple[int, ...] = (
        768,
        1280,
    )  # one per text encoder, in the order of ENCODERS; empty: no text branch
    text_tokens: int = 3
    text_depth: int = 4
    text_hidden: int = 1024  # hidden width of the MLP from the embedding to the tokens
    adapter_tokens: int = 25  # 0: no adapter branch
    adapter_width: int = 768
    adapter_depth: int = 6
    context_width: int = 2048  # text width of the UNet
    site_widths: tuple[int, ...] = (
        (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10
    )  # in checkpoint order
    head_width: int = 64
    embedding_width: int = 512
    stage_widths: tuple[int, ...] = STAGE_WIDTHS  # channels of the recogniser's four stages
    recognizer: str = ""  # digest of the face network used in training; empty: not recorded
    rescale: str = (
        ""  # scales to begin with, as `RescaleSchedule.parse` reads them; empty: the published ones
    )

    non_weight_settings: ClassVar[tuple[str, ...]] = ("head_width",)  # affects an identity, but no weight

    def __post_init__(self) -> None:
        if not self.text_widths and not self.adapter_tokens:
            raise InputError(
                "a UniID adapter needs a text branch (text_widths), an adapter branch (adapter_tokens), or both"
            )
        if len(self.text_widths) > len(ENCODERS):
            raise InputError(
                f"text_widths must have at most {len(ENCODERS)} entries ({', '.join(ENCODERS)}), got {self.text_widths}"
            )
        if len(self.stage_widths) != len(STAGE_WIDTHS):
            raise InputError(
                f"stage_widths must have {len(STAGE_WIDTHS)} entries, one per stage of the recogniser, got {self.stage_widths}"
            )
        if self.rescale:
            RescaleSchedule.parse(self.rescale)
        names = (
            "head_width",
            "stage_widths",
            *(TEXT_SIZES if self.has_text_branch else ()),
            *(ADAPTER_SIZES if self.has_adapter_branch else ()),
        )
        for name in names:
            value = getattr(self, name)
            if not value or any(size < 1 for size in (value if isinstance(value, tuple) else (value,))):
                raise InputError(f"{name} must be at least 1, got {value}")
        for width in (*self.text_widths, *([self.adapter_width] if self.adapter_tokens else [])):
            if width % self.head_width:
                raise InputError(f"width {width} must be divisible by head_width {self.head_width}")

    @property
    def has_text_branch(self) -> bool:
        return bool(self.text_widths)

    @property
    def has_adapter_branch(self) -> bool:
        return self.adapter_tokens > 0


def needs(config: UniIDConfig) -> Needs:
    """Require the recogniser's stages, and the text encoders of the text branch."""
    widths = dict(zip(ENCODERS, config.text_widths, strict=False))
    return Needs(stages=True, shallow_side=FUSED_SIDE, text_widths=widths, all_text_encoders=True)


def usual_rescale(config: UniIDConfig) -> RescaleSchedule:
    """Return the scales to begin with."""
    return RescaleSchedule.parse(config.rescale) if config.rescale else RescaleSchedule()


def branches(config: UniIDConfig) -> str:
    """Name the branches of an adapter."""
    parts = [
        name
        for name, there in (("text", config.has_text_branch), ("adapter", config.has_adapter_branch))
        if there
    ]
    return " and ".join(parts) + (" branches" if len(parts) > 1 else " branch")


def describe(config: UniIDConfig) -> list[str]:
    """Describe an adapter of these sizes, in lines."""
    lines = [branches(config)]
    if config.has_adapter_branch:
        family = family_name(len(config.site_widths), config.context_width)
        lines.append(f"for {family}; {config.adapter_tokens} adapter tokens")
    if config.has_text_branch:
        widths = ", ".join(
            f"{name} {width}" for name, width in zip(ENCODERS, config.text_widths, strict=False)
        )
        lines.append(f"{config.text_tokens} text tokens for the text encoders {widths}")
    recognizer = (
        config.recognizer or "not recorded in the file (the published weights use iResNet-100, Glint360K)"
    )
    return [*lines, f"face recogniser: {recognizer}"]


def notes(config: UniIDConfig, mechanisms: Mechanisms) -> tuple[str, ...]:
    """Return a note if an adapter lacks a branch."""
    if not config.has_text_branch:
        return (
            "it has no text branch: identity acts through attention only, and ID Prompt adds no identity tokens. "
            "Choose the text branch's file as text_branch for the complete method.",
        )
    if not config.has_adapter_branch:
        return (
            "it has no adapter branch: identity acts through ID Prompt only, and Apply ID Adapter has nothing to add. "
            "Choose the adapter branch's file as adapter and this one as text_branch for the complete method.",
        )
    return ()
