"""Recognising checkpoint layouts by their keys and shapes, never by a file's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .errors import CheckpointError, InputError
from .methods.uniid import UniIDConfig

TEXT_PREFIX = "text_branch."
ADAPTER_PREFIX = "adapter_branch."

# Keys of the branches when saved without their prefix.
_TEXT_HEADS = re.compile(r"^(?:proj|norm|text_resampler)_\d\.")
_ADAPTER_HEADS = re.compile(r"^(?:latents$|adapter_resampler\.|adapter_modules\.)")

# What a file is, when it is not ours: (a key that only this kind has, what people call it, what to do with it).
_FOREIGN = (
    (
        r"^layers\.(?:gates|deltas)\.\d",
        "an IDAdapter without its config, which stands in the metadata of the .safetensors file",
        "export or copy the original file again, without converting it",
    ),
    (
        r"^(?:image_proj(?:_model)?|ip_adapter|adapter_modules)\.",
        "an IP-Adapter or InstantID file",
        "load it with the nodes of those packs",
    ),
    (r"^id_adapter(?:_attn_layers)?\.", "a PuLID file", "load it with a PuLID pack"),
    (
        r"^layer1\.0\.prelu\.",
        "a face recognition network (iResNet)",
        "put it in models/idadapter/recognizers and choose it in Load Face Analyzer",
    ),
    (
        r"^(?:model\.diffusion_model|first_stage_model|conditioner)\.",
        "a Stable Diffusion checkpoint",
        "load it with Load Checkpoint",
    ),
    (r"(?:^|[._])lora[._](?:up|down|A|B)\b", "a LoRA", "load it with Load LoRA"),
    (
        r"^(?:down_blocks|up_blocks|mid_block)\.",
        "a diffusers UNet without any adapter",
        "choose the file that holds the adapter",
    ),
    (r"^vision_model\.", "a CLIP vision model", "load it with Load CLIP Vision"),
)


def uniid_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The UniID weights in a state dict, under the published names; empty when there are none.

    Accepts the published files, the same without their prefix, and whole training dumps (the model's other parts are left
    out), each optionally behind "module." as distributed training writes it.

    Raises:
        CheckpointError: several copies of the same weights (an average beside the model), none of them at the top.
    """
    copies: dict[str, dict[str, Tensor]] = {}  # published name -> what stands before it -> tensor
    for key, tensor in state.items():
        name = key.removeprefix("module.")
        for prefix in (TEXT_PREFIX, ADAPTER_PREFIX):
            position = name.find(prefix)
            if position == 0 or (position > 0 and name[position - 1] == "."):
                copies.setdefault(name[position:], {})[name[:position]] = tensor
    if copies:
        return {name: _only_copy(name, found, source) for name, found in copies.items()}
    found: dict[str, Tensor] = {}
    bare = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if _holds_text_branch(bare):
        found |= {TEXT_PREFIX + key: tensor for key, tensor in bare.items() if _TEXT_HEADS.match(key)}
    if _holds_adapter_branch(bare):
        found |= {ADAPTER_PREFIX + key: tensor for key, tensor in bare.items() if _ADAPTER_HEADS.match(key)}
    return found


def _only_copy(name: str, copies: Mapping[str, Tensor], source: str) -> Tensor:
    if len(copies) == 1 or "" in copies:
        return copies.get("", next(iter(copies.values())))
    raise CheckpointError(
        f"{source}: holds {name} {len(copies)} times (behind {', '.join(sorted(copies))}). Which copy is meant cannot be told; "
        "export the one you want to a file of its own."
    )


def _holds_text_branch(keys: Iterable[str]) -> bool:
    return any(key.startswith("text_resampler_1.") for key in keys)


def _holds_adapter_branch(keys: Iterable[str]) -> bool:
    return any(key.startswith("adapter_resampler.") for key in keys)


def uniid_config(state: Mapping[str, Tensor], source: str) -> UniIDConfig:
    """The sizes of UniID weights under the published names, read from their shapes.

    Raises:
        CheckpointError: a tensor that decides a size is missing or has an impossible shape; names it.
    """

    def shape(key: str, dimensions: int = 2) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(
                f"{source}: this looks like a UniID file, but {key} is missing. The file is incomplete; download it again."
            )
        found = tuple(state[key].shape)
        if len(found) != dimensions or 0 in found:
            raise CheckpointError(
                f"{source}: this looks like a UniID file, but {key} has the shape {found} instead of {dimensions} "
                "dimensions. Download or export the file again."
            )
        return found

    def depth(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
        return 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=-1)

    text_widths: list[int] = []
    text: dict[str, Any] = {}
    while any(key.startswith(f"{TEXT_PREFIX}text_resampler_{len(text_widths) + 1}.") for key in state):
        number = len(text_widths) + 1
        width = shape(f"{TEXT_PREFIX}norm_{number}.weight", 1)[0]
        text_widths.append(width)
        hidden, embedding = shape(f"{TEXT_PREFIX}proj_{number}.proj.0.weight")
        text = {
            "text_tokens": shape(f"{TEXT_PREFIX}proj_{number}.proj.2.weight")[0] // width,
            "text_depth": depth(f"{TEXT_PREFIX}text_resampler_{number}."),
            "text_hidden": hidden,
            "embedding_width": embedding,
        }
    adapter: dict[str, Any] = {"adapter_tokens": 0}
    site_widths: tuple[int, ...] = ()
    if any(key.startswith(ADAPTER_PREFIX) for key in state):
        _, tokens, width = shape(ADAPTER_PREFIX + "latents", 3)
        adapter = {
            "adapter_tokens": tokens,
            "adapter_width": width,
            "adapter_depth": depth(ADAPTER_PREFIX + "adapter_resampler."),
            "context_width": shape(ADAPTER_PREFIX + "adapter_resampler.proj_out.weight")[0],
        }
        pattern = re.compile(re.escape(ADAPTER_PREFIX) + r"adapter_modules\.(\d+)\.to_k_ip\.weight")
        numbers = sorted(int(match[1]) for key in state if (match := pattern.fullmatch(key)))
        expected = list(range(1, 2 * len(numbers), 2))
        if not numbers or numbers != expected:
            missing = sorted(set(range(1, max(numbers, default=1) + 1, 2)) - set(numbers))
            raise CheckpointError(
                f"{source}: adapter_modules must be numbered 1, 3, 5, … without a gap; missing {missing[:5]}. "
                "The file is incomplete; download it again."
            )
        site_widths = tuple(shape(f"{ADAPTER_PREFIX}adapter_modules.{n}.to_k_ip.weight")[0] for n in numbers)
    try:
        return UniIDConfig(text_widths=tuple(text_widths), site_widths=site_widths, **text, **adapter)
    except InputError as error:
        raise CheckpointError(f"{source}: no UniID adapter of a known kind: {error}.") from error


def describe_foreign(keys: Iterable[str]) -> str:
    """What a file that holds no adapter seems to be, and what to do with it."""
    names = [key.removeprefix("module.") for key in keys]
    for pattern, kind, advice in _FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return f"this is {kind}: {advice}"
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return f"it holds no ID adapter (first keys: {shown}); choose a UniID or IDAdapter file"
