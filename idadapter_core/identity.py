"""Reads and writes identity files (safetensors, strict), and compares identities."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import read_tensors, some, write_safetensors
from .formats import FORMAT, FORMAT_VERSION, describe_foreign, require_kind
from .mechanisms.text import TextKind
from .methods import METHODS
from .types import Identity

_IDENTITY_TENSORS = ("adapter_tokens", "adapter_tokens_uncond", "adapter_bias")
_FLAT = ("adapter_bias", "embedding")  # the tensors of two dimensions


def save_identity(identity: Identity, path: str | Path) -> None:
    """Write an identity file (safetensors). The write is atomic."""
    tensors = _identity_tensors(identity)
    if identity.embedding is not None:
        tensors["embedding"] = identity.embedding.detach().cpu().contiguous()
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
    embedding = tensors.get("embedding")
    odd = [
        key
        for key, t in tensors.items()
        if key not in {*known, "embedding"} or t.ndim != (2 if key in _FLAT else 3) or t.shape[0] != 1
    ]
    if bias is not None and (tokens is None or bias.shape != tokens.shape[:2]):
        odd.append("adapter_bias")
    if odd or not tensors:
        raise CheckpointError(
            f"{path.name}: an identity holds tokens of shape (1, tokens, width), and perhaps a bias of shape (1, tokens) and an embedding (1, width); "
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
    )


def text_kind(identity: Identity) -> TextKind | None:
    """Return the kind of an identity's text tokens, or None without any."""
    method = METHODS.get(identity.method)
    return method.text if method is not None and identity.text_tokens else None


def identical(one: Identity, other: Identity) -> bool:
    """Return whether two identities hold the same tokens of the same adapter. Files of before have no embedding, so it does not count."""
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
