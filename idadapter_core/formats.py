"""Recognises the project's own files and foreign ones by metadata, keys and shapes, never by file name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .errors import CheckpointError
from .methods import METHODS
from .methods.method import ForeignFormat

FORMAT = "idadapter"
FORMAT_VERSION = 1
KINDS = ("adapter", "identity")

# Kinds of foreign files: (pattern of a key that only this kind has, its common name, advice).
_FOREIGN_FORMATS = (
    *(hint for method in METHODS.values() for hint in method.files.foreign_formats),
    ForeignFormat(
        r"^(?:image_proj(?:_model)?|ip_adapter|adapter_modules)\.",
        "an IP-Adapter or InstantID file",
        "load it with the nodes of those packs",
    ),
    ForeignFormat(r"^id_adapter(?:_attn_layers)?\.", "a PuLID file", "load it with a PuLID pack"),
    ForeignFormat(
        r"^layer1\.0\.prelu\.",
        "a face recognition network (iResNet)",
        "put it in models/idadapter/recognizers and choose it in Load Face Analyzer",
    ),
    ForeignFormat(
        r"^(?:model\.diffusion_model|first_stage_model|conditioner)\.",
        "a Stable Diffusion checkpoint",
        "load it with Load Checkpoint",
    ),
    ForeignFormat(r"(?:^|[._])lora[._](?:up|down|A|B)\b", "a LoRA", "load it with Load LoRA"),
    ForeignFormat(
        r"^(?:down_blocks|up_blocks|mid_block)\.",
        "a diffusers UNet without any adapter",
        "choose the file that holds the adapter",
    ),
    ForeignFormat(r"^vision_model\.", "a CLIP vision model", "load it with Load CLIP Vision"),
)


def require_kind(metadata: Mapping[str, str], kind: str, source: str) -> None:
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{source}: written in format version {version or '(none)'}, this release reads up to {FORMAT_VERSION}; "
            "update ComfyUI-IDAdapter."
        )
    found = metadata.get("kind", "(none)")
    if found not in KINDS:
        raise CheckpointError(f"{source}: its kind is {found}, this release knows {' and '.join(KINDS)}.")
    if found != kind:
        raise CheckpointError(
            f"{source}: this file holds an {found}, not an {kind}; choose it in the node that loads an {found}."
        )


def describe_foreign(keys: Iterable[str]) -> str:
    """Describe the likely kind of a file without an adapter, with advice."""
    names = [key.removeprefix("module.") for key in keys]
    for hint in _FOREIGN_FORMATS:
        if any(re.search(hint.pattern, name) for name in names):
            return f"this is {hint.kind}: {hint.advice}"
    *others, last = (method.title for method in METHODS.values())
    known = f"{', '.join(others)} or {last}"
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return f"it holds no ID adapter (first keys: {shown}); choose a {known} file"
