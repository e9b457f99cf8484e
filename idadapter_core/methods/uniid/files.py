"""UniID's published files, recognised by keys and shapes, and joining its two branches from two files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, InputError, MismatchError
from ...published import ADAPTERS, DETECTOR, GLINT360K_R100, SDXL, PublishedFile
from ..method import Files, Layout, State
from .config import TEXT_SIZES, UniIDConfig

TEXT_PREFIX = "text_branch."
ADAPTER_PREFIX = "adapter_branch."

# Keys of the branches if saved without their prefix.
_TEXT_HEADS = re.compile(r"^(?:proj|norm|text_resampler)_\d\.")
_ADAPTER_HEADS = re.compile(r"^(?:latents$|adapter_resampler\.|adapter_modules\.)")


def published_state(state: Mapping[str, Tensor], source: str) -> State:
    """Return the UniID weights in a state dict, under the published names; empty if there are none.

    Accepts the published files, the same without their prefix, and whole training dumps (other parts of the model are
    ignored), each with or without the prefix "module." of distributed training.

    Raises:
        CheckpointError: several copies of the same weights (such as an EMA next to the model), none of them at the top level.
    """
    copies: dict[str, dict[str, Tensor]] = {}  # published name -> prefix -> tensor
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


def published_config(state: State, source: str) -> UniIDConfig:
    """Derive the sizes of UniID weights under the published names from their shapes.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape; names it.
    """
    text_sizes = _text_sizes(state, source)
    adapter_sizes = _adapter_sizes(state, source)
    try:
        return UniIDConfig(**text_sizes, **adapter_sizes)
    except InputError as error:
        raise CheckpointError(f"{source}: no UniID adapter of a known kind: {error}.") from error


def _text_sizes(state: State, source: str) -> dict[str, Any]:
    """Derive the sizes of the text branch, including the width of each text encoder; no widths without a text branch."""
    widths: list[int] = []
    sizes: dict[str, Any] = {}
    while any(key.startswith(f"{TEXT_PREFIX}text_resampler_{len(widths) + 1}.") for key in state):
        number = len(widths) + 1
        (width,) = _shape(state, source, f"{TEXT_PREFIX}norm_{number}.weight", 1)
        widths.append(width)
        hidden, embedding = _shape(state, source, f"{TEXT_PREFIX}proj_{number}.proj.0.weight")
        sizes = {
            "text_tokens": _shape(state, source, f"{TEXT_PREFIX}proj_{number}.proj.2.weight")[0] // width,
            "text_depth": _depth(state, f"{TEXT_PREFIX}text_resampler_{number}."),
            "text_hidden": hidden,
            "embedding_width": embedding,
        }
    return {"text_widths": tuple(widths), **sizes}


def _adapter_sizes(state: State, source: str) -> dict[str, Any]:
    """Derive the sizes of the adapter branch, including the width of each site; no tokens and sites without one."""
    if not any(key.startswith(ADAPTER_PREFIX) for key in state):
        return {"adapter_tokens": 0, "site_widths": ()}
    _, tokens, width = _shape(state, source, ADAPTER_PREFIX + "latents", 3)
    depth = _depth(state, ADAPTER_PREFIX + "adapter_resampler.")
    context_width = _shape(state, source, ADAPTER_PREFIX + "adapter_resampler.proj_out.weight")[0]
    keys = (f"{ADAPTER_PREFIX}adapter_modules.{n}.to_k_ip.weight" for n in _site_numbers(state, source))
    return {
        "adapter_tokens": tokens,
        "adapter_width": width,
        "adapter_depth": depth,
        "context_width": context_width,
        "site_widths": tuple(_shape(state, source, key)[0] for key in keys),
    }


def _site_numbers(state: State, source: str) -> list[int]:
    """Return the numbers of the adapter modules: 1, 3, 5, …"""
    pattern = re.compile(re.escape(ADAPTER_PREFIX) + r"adapter_modules\.(\d+)\.to_k_ip\.weight")
    numbers = sorted(int(match[1]) for key in state if (match := pattern.fullmatch(key)))
    if not numbers or numbers != list(range(1, 2 * len(numbers), 2)):
        missing = sorted(set(range(1, max(numbers, default=1) + 1, 2)) - set(numbers))
        raise CheckpointError(
            f"{source}: adapter_modules must be numbered 1, 3, 5, … without a gap; missing {missing[:5]}. "
            "The file is incomplete; download it again."
        )
    return numbers


def _shape(state: State, source: str, key: str, dimensions: int = 2) -> tuple[int, ...]:
    """Return the shape of a tensor that determines a size.

    Raises:
        CheckpointError: the tensor is missing, or has the wrong number of dimensions or an empty one.
    """
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


def _depth(state: State, prefix: str) -> int:
    """Count the numbered layers under a name."""
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=-1)


def join(
    names: tuple[str, str],
    states: tuple[State, State],
    configs: tuple[UniIDConfig, UniIDConfig],
    same_file: bool,
) -> tuple[State, UniIDConfig]:
    """Join the adapter branch of one file and the text branch of another into one adapter.

    Raises:
        InputError: the files are swapped, the same file twice, or lack their branch.
        MismatchError: they come from different trainings.
    """
    first, second = names
    config, text = configs
    if problem := _branches_problem(names, config, text, same_file):
        raise InputError(problem)
    if config.head_width != text.head_width:
        raise MismatchError(
            f"{first} and {second} were not made for each other: the attention heads of the first are "
            f"{config.head_width} wide, those of the second {text.head_width}. Choose the two branches of one training."
        )
    if config.stage_widths != text.stage_widths:
        raise MismatchError(
            f"{first} and {second} were not made for each other: the stages of their face recognisers are {config.stage_widths} and "
            f"{text.stage_widths} wide. Choose the two branches of one training."
        )
    digests = {c.recognizer for c in configs} - {""}
    if len(digests) > 1:
        raise MismatchError(
            f"{first} and {second} were trained with different face recognisers ({', '.join(sorted(digests))}) "
            "and cannot work together."
        )
    of_text = {name: getattr(text, name) for name in TEXT_SIZES}
    joined = replace(config, **of_text, recognizer="".join(digests))
    wanted = {key: tensor for key, tensor in states[1].items() if key.startswith(TEXT_PREFIX)}
    return {**states[0], **wanted}, joined


def _branches_problem(names: tuple[str, str], adapter: UniIDConfig, text: UniIDConfig, same: bool) -> str:
    """Explain why two UniID files cannot be an adapter and its text branch; empty if they can."""
    first, second = names
    if not adapter.has_text_branch and text.has_text_branch:
        return ""
    if same:
        if not text.has_text_branch:
            rest = "it holds no text branch: choose the file of the text branch as text_branch, or set that to 'none'"
        elif adapter.has_adapter_branch:
            rest = "it already holds a text branch: set text_branch to 'none'"
        else:
            rest = (
                "it already holds a text branch, but no adapter branch: choose the file of the adapter branch as adapter, or set "
                "text_branch to 'none'"
            )
        return f"{first} is chosen twice, as adapter and as text_branch; {rest}."
    if not adapter.has_adapter_branch and not text.has_text_branch:
        return (
            f"the two branches are exchanged: {first} holds the text branch, {second} the adapter branch. Exchange the two files: "
            f"choose {second} as adapter and {first} as text_branch."
        )
    if not text.has_text_branch:
        return (
            f"{second} holds no text branch, only the adapter branch, as {first} does. Choose the file of the text branch as "
            "text_branch, or 'none'."
        )
    if not adapter.has_adapter_branch:
        if text.has_adapter_branch:
            return f"{second} holds both branches, {first} the text branch alone. Choose {second} as adapter and set text_branch to 'none'."
        return (
            f"{first} and {second} both hold the text branch. Choose the file of the adapter branch as adapter, or set text_branch "
            "to 'none'."
        )
    return f"{first} already holds a text branch; set text_branch to 'none'."


def _belongs(key: str, config: UniIDConfig) -> bool:
    if key.startswith(TEXT_PREFIX):
        return config.has_text_branch
    return config.has_adapter_branch


FILES = Files(
    layers_prefix="adapter_branch.",
    layers_head="adapter_branch.adapter_modules.",
    layouts=(Layout(published_state, published_config),),
    join=join,
    keep=_belongs,
)

PUBLISHED = (
    SDXL,
    PublishedFile(
        "adapter",
        "pytorch_model.bin of the adapter branch",
        f"{ADAPTERS}/uniid/adapter_branch",
        "huggingface.co/pangly/UniID",
        "code MIT; weights: see their page",
    ),
    PublishedFile(
        "text_branch",
        "pytorch_model.bin of the text branch",
        f"{ADAPTERS}/uniid/text_branch",
        "huggingface.co/pangly/UniID",
        "code MIT; weights: see their page",
    ),
    GLINT360K_R100,
    DETECTOR,
)
