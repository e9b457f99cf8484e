"""Reads and writes identity files (safetensors, strict), and compares and merges identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, InputError, MismatchError
from .files import read_tensors, some, write_safetensors
from .formats import FORMAT, FORMAT_VERSION, describe_foreign, require_kind
from .mechanisms.text import TextKind
from .methods import METHODS
from .types import Identity

_THUMBNAIL = "thumbnail"
_IDENTITY_TENSORS = ("adapter_tokens", "adapter_tokens_uncond", "adapter_bias")


def save_identity(identity: Identity, path: str | Path, *, thumbnail: bool = True) -> None:
    """Write an identity file (safetensors), with the thumbnail of the face or without. The write is atomic."""
    tensors = _identity_tensors(identity)
    if identity.embedding is not None:
        tensors["embedding"] = identity.embedding.detach().cpu().contiguous()
    if thumbnail and identity.thumbnail is not None:
        tensors[_THUMBNAIL] = identity.thumbnail.detach().cpu().contiguous()
    write_safetensors(tensors, _identity_metadata(identity), Path(path))


def load_identity(path: str | Path) -> Identity:
    """Read an identity file.

    Raises:
        CheckpointError: unreadable, or not an identity of this project.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name}: not an identity file of this project; {describe_foreign(tensors)}."
        )
    require_kind(metadata, "identity", path.name)
    if missing := [key for key in ("method", "adapter", "recognizer") if key not in metadata]:
        raise CheckpointError(
            f"{path.name}: its metadata lacks {', '.join(missing)}; make the identity again from the photos."
        )
    text = {
        key.removeprefix("text_tokens."): t for key, t in tensors.items() if key.startswith("text_tokens.")
    }
    known = {*_IDENTITY_TENSORS, *(f"text_tokens.{name}" for name in text)}
    bias, tokens = tensors.get("adapter_bias"), tensors.get("adapter_tokens")
    embedding, thumbnail = tensors.get("embedding"), tensors.pop(_THUMBNAIL, None)
    odd = [
        key
        for key, t in tensors.items()
        if key != "adapter_bias"
        and (
            key not in {*known, "embedding"} or t.ndim != (2 if key == "embedding" else 3) or t.shape[0] != 1
        )
    ]
    if thumbnail is not None and not is_picture(thumbnail):
        odd.append(_THUMBNAIL)
    if bias is not None and (tokens is None or bias.shape != tokens.shape[:2]):
        odd.append("adapter_bias")
    if odd or not tensors:
        raise CheckpointError(
            f"{path.name}: an identity holds tokens of shape (1, tokens, width), and perhaps a bias of shape (1, tokens) and an embedding (1, width) "
            f"and a thumbnail (height, width, 3); "
            f"this file has {some(odd) or 'none'}. Make the identity again from the photos."
        )
    return Identity(
        adapter_tokens=tensors.get("adapter_tokens"),
        adapter_tokens_uncond=tensors.get("adapter_tokens_uncond"),
        text_tokens=text,
        method=metadata["method"],
        adapter=metadata["adapter"],
        recognizer=metadata["recognizer"],
        class_word=metadata.get("class_word", ""),
        adapter_bias=bias,
        embedding=embedding,
        thumbnail=thumbnail,
    )


def is_picture(tensor: Tensor) -> bool:
    """Return whether a tensor is a picture (H, W, 3), RGB uint8."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[2] == 3 and tensor.numel() > 0


def text_kind(identity: Identity) -> TextKind | None:
    """Return the kind of an identity's text tokens, or None without any."""
    method = METHODS.get(identity.method)
    return method.text if method is not None and identity.text_tokens else None


def merged(one: Identity, other: Identity, ratio: float) -> Identity:
    """Return an identity between two of one adapter.

    Tokens of equal number that count equally often are interpolated, and their lengths, too. Of different numbers (one and four photos,
    say), all stand side by side and count as the ratio says, together as often as those of one identity.

    Args:
        ratio: 0: exactly `one`; 1: exactly `other`.

    Raises:
        InputError: a ratio outside 0..1.
        MismatchError: the identities belong to different adapters or recognisers.
    """
    if not 0 <= ratio <= 1:
        raise InputError(
            f"ratio must be between 0 (the first identity alone) and 1 (the second alone), got {ratio}"
        )
    if one.adapter != other.adapter:
        raise MismatchError(
            f"the two identities were made with different adapters ({one.adapter} and {other.adapter}), whose numbers have nothing in common. "
            "Make both with one adapter: Mix Face Features for each person."
        )
    if one.recognizer != other.recognizer:
        raise MismatchError(
            f"the two identities were made with different face recognisers ({one.recognizer or '(unknown)'} and "
            f"{other.recognizer or '(unknown)'}). Make both with one Load Face Analyzer."
        )
    if ratio in (0, 1):
        return other if ratio else one
    other = move_identity(other, _device_of(one))
    is_aligned = _shape(one.adapter_tokens) == _shape(other.adapter_tokens) and count_alike(one, other)
    if not is_aligned and not METHODS[one.method].weighs_tokens:
        raise MismatchError(
            f"the two identities hold different numbers of tokens, {_shape(one.adapter_tokens)[1]} and {_shape(other.adapter_tokens)[1]}, as of "
            f"different numbers of photos, and {METHODS[one.method].title} cannot weigh tokens. Make both of equally many photos, or choose "
            "mode mean in Mix Face Features."
        )
    blend = _between if is_aligned else _side_by_side
    is_nobody_alike = _shape(one.adapter_tokens_uncond) == _shape(other.adapter_tokens_uncond)
    blend_nobody = _between if is_nobody_alike else _side_by_side
    return replace(
        one,
        adapter_tokens=_both(blend, one.adapter_tokens, other.adapter_tokens, ratio),
        adapter_tokens_uncond=_both(
            blend_nobody, one.adapter_tokens_uncond, other.adapter_tokens_uncond, ratio
        ),
        text_tokens={
            name: _between(tokens, other.text_tokens[name], ratio) for name, tokens in one.text_tokens.items()
        },
        class_word=one.class_word if one.class_word == other.class_word else "",
        adapter_bias=one.adapter_bias if is_aligned else _biases(one, other, ratio),
        embedding=_both(_between, one.embedding, other.embedding, ratio),
        thumbnail=None,  # nobody looks like that
    )


def _device_of(identity: Identity) -> torch.device:
    tensors = [identity.adapter_tokens, *identity.text_tokens.values()]
    return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))


def _shape(tokens: Tensor | None) -> tuple[int, ...]:
    return () if tokens is None else tuple(tokens.shape)


def _both(
    blend: Callable[[Tensor, Tensor, float], Tensor], one: Tensor | None, other: Tensor | None, ratio: float
) -> Tensor | None:
    """Blend two tensors; None where one is missing."""
    return None if one is None or other is None else blend(one, other, ratio)


def _between(one: Tensor, other: Tensor, ratio: float) -> Tensor:
    """Interpolate tokens (1, T, D) and their lengths."""
    mixed = torch.lerp(one.float(), other.float(), ratio)
    lengths = torch.lerp(
        one.float().norm(dim=-1, keepdim=True), other.float().norm(dim=-1, keepdim=True), ratio
    )
    directions = mixed / mixed.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    found: Tensor = (directions * lengths).to(one.dtype)
    return found


def _side_by_side(one: Tensor, other: Tensor, ratio: float) -> Tensor:
    return torch.cat([one, other.to(one.dtype)], dim=1)


def _biases(one: Identity, other: Identity, ratio: float) -> Tensor | None:
    """Logs of how often the tokens of both count: the share of each times as often as before, so together as often as one identity."""
    parts = []
    for identity, share in ((one, 1 - ratio), (other, ratio)):
        if identity.adapter_tokens is None:
            return None
        before = identity.adapter_bias
        if before is None:
            before = identity.adapter_tokens.new_zeros(identity.adapter_tokens.shape[:2])
        parts.append(before.float() + math.log(share))
    return torch.cat(parts, dim=1)


def count_alike(one: Identity, other: Identity) -> bool:
    """Return whether the tokens of two identities count equally often in the attention."""
    if one.adapter_bias is None or other.adapter_bias is None:
        return one.adapter_bias is other.adapter_bias
    return torch.equal(one.adapter_bias, other.adapter_bias)


def move_identity(identity: Identity, device: torch.device | str) -> Identity:
    """Return a copy of an identity with its tensors on `device`; what pictures are compared with stays on the CPU."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(
        identity,
        adapter_tokens=moved(identity.adapter_tokens),
        adapter_tokens_uncond=moved(identity.adapter_tokens_uncond),
        adapter_bias=moved(identity.adapter_bias),
        text_tokens={name: tokens.to(device) for name, tokens in identity.text_tokens.items()},
    )


def identical(one: Identity, other: Identity) -> bool:
    """Return whether two identities hold the same tokens of the same adapter. Embedding and thumbnail may be missing in a file, so they do not count."""
    left, right = _identity_tensors(one), _identity_tensors(other)
    same_tensors = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return same_tensors and _identity_metadata(one) == _identity_metadata(other)


def _identity_tensors(identity: Identity) -> dict[str, Tensor]:
    tensors = {f"text_tokens.{name}": tensor for name, tensor in identity.text_tokens.items()}
    for name in _IDENTITY_TENSORS:
        if (tensor := getattr(identity, name)) is not None:
            tensors[name] = tensor
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _identity_metadata(identity: Identity) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": "identity",
        "method": identity.method,
        "adapter": identity.adapter,
        "recognizer": identity.recognizer,
        "class_word": identity.class_word,
    }
