"""Adapter and identity files: reading every layout, writing our own (safetensors, config as JSON in the metadata, strict)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats
from .errors import CheckpointError, InputError, MismatchError
from .files import key_problems, read_tensors, some, state_digest, write_safetensors
from .methods import uniid
from .sites import Site, family_name
from .types import FaceFeatures, Identity, Mix

FORMAT = "idadapter"
FORMAT_VERSION = 1
KINDS = ("adapter", "identity")
FILES_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The trained weights of one method for one UNet family.

    `encoder` makes identities and is a module of its own for the host's memory manager; `projections` are only read, one
    site at a time, when a sampling run starts.
    """

    name: str  # for messages
    digest: str  # of all weights
    method: str
    config: uniid.UniIDConfig
    encoder: uniid.UniIDEncoder
    projections: uniid.SiteProjections
    info: str = ""  # what was read from where
    notes: tuple[str, ...] = field(default=())  # what the user should know before using it

    @property
    def family(self) -> str:
        """The UNet it was made for, in words."""
        return family_name(len(self.config.site_widths), self.config.context_width)

    def encode(self, features: FaceFeatures, mix: Mix | None = None) -> Identity:
        """One identity from the photos of one person (see `methods.uniid.encode`).

        Raises:
            MismatchError: the features come from another recogniser than the adapter was trained with.
        """
        trained_with = self.config.recognizer
        if trained_with and features.recognizer and trained_with != features.recognizer:
            raise MismatchError(
                f"{self.name} was trained with the face recogniser {trained_with}, these features come from "
                f"{features.recognizer}. Choose the recogniser it was trained with in Load Face Analyzer."
            )
        identity = uniid.encode(self.encoder, self.config, features, mix or Mix())
        return dataclasses.replace(identity, adapter=self.digest)

    def require_sites(
        self, sites: tuple[Site, ...], widths: Mapping[str, tuple[int, int]], model_name: str
    ) -> None:
        """Raise MismatchError unless the adapter fits a UNet.

        Args:
            sites: of the UNet (`sites.attention_sites`).
            widths: (channels, context width) of each site's to_k, by `Site.comfy_module`.
            model_name: what to call the UNet's model in the message.
        """
        if not self.config.has_adapter_branch:
            return
        channels = tuple(widths[site.comfy_module][0] for site in sites)
        contexts = {widths[site.comfy_module][1] for site in sites}
        if channels == self.config.site_widths and contexts == {self.config.context_width}:
            return
        context = max(contexts)
        difference = ""
        if len(channels) == len(self.config.site_widths) and context == self.config.context_width:
            difference = " The two differ in the widths of their layers."
        raise MismatchError(
            f"{self.name} was made for {self.family}, but this model is {model_name}: "
            f"{family_name(len(sites), context)}.{difference} Load a model of the adapter's family, or an adapter of the model's."
        )

    def require_identity(self, identity: Identity, name: str) -> None:
        """Raise MismatchError unless this adapter made the identity. `name` is what to call the identity in the message."""
        if identity.adapter != self.digest:
            raise MismatchError(
                f"{name} was made with another adapter (weights {identity.adapter}), not with {self.name} ({self.digest}). "
                "An identity works with its own adapter only: load that one, or make the identity again from the photos with "
                "this adapter (Mix Face Features)."
            )
        trained_with = self.config.recognizer
        if trained_with and identity.recognizer != trained_with:
            raise MismatchError(
                f"{name} was made with the face recogniser {identity.recognizer or '(unknown)'}, but {self.name} was trained "
                f"with {trained_with}. Make the identity again with that recogniser (Load Face Analyzer)."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """All weights under the published names."""
        projections = {
            formats.ADAPTER_PREFIX + key: tensor for key, tensor in self.projections.state_dict().items()
        }
        return {**self.encoder.state_dict(), **projections}


def load_adapter(
    path: str | Path, text_branch: str | Path | None = None, progress: Callable[[float], None] | None = None
) -> Adapter:
    """Read an adapter from a file, or from a published folder (with or without its config.json).

    Args:
        path: our own safetensors, or any published or training layout (see `formats.uniid_state`).
        text_branch: a second file whose text branch is added; UniID publishes its two branches apart.
        progress: called with the share done, 0 to 1; naming the weights of a gigabyte takes seconds.

    Raises:
        CheckpointError: unreadable, unrelated, incomplete, or holding unexpected weights; says which.
        InputError: both files hold the same branch.
    """
    state, config, source = _read_adapter(Path(path))
    if text_branch is not None:
        second, second_config, second_source = _read_adapter(Path(text_branch))
        wanted = {key: tensor for key, tensor in second.items() if key.startswith(formats.TEXT_PREFIX)}
        if not wanted:
            raise CheckpointError(
                f"{second_source} holds no text branch (only {_branches(second_config)}); choose the file of the text branch, "
                "or 'none'."
            )
        if config.has_text_branch:
            raise InputError(f"{source} already holds a text branch; set text_branch to 'none'.")
        state |= wanted
        digests = {c.recognizer for c in (config, second_config)} - {""}
        if len(digests) > 1:
            raise MismatchError(
                f"{source} and {second_source} were trained with different face recognisers ({', '.join(sorted(digests))}) "
                "and cannot work together."
            )
        config = dataclasses.replace(formats.uniid_config(state, source), recognizer="".join(digests))
        source = f"{source} + {second_source}"
    return _build(source, state, config, progress)


def _build(
    source: str,
    state: dict[str, Tensor],
    config: uniid.UniIDConfig,
    progress: Callable[[float], None] | None,
) -> Adapter:
    with torch.device("meta"):
        encoder, projections = uniid.UniIDEncoder(config), uniid.SiteProjections(config)
    head = formats.ADAPTER_PREFIX + "adapter_modules."
    # The encoder runs once per identity, in fp32 whatever the file holds; the projections keep the file's dtype.
    encoder_state = {key: tensor.float() for key, tensor in state.items() if not key.startswith(head)}
    projection_state = {
        key.removeprefix(formats.ADAPTER_PREFIX): tensor
        for key, tensor in state.items()
        if key.startswith(head)
    }
    for module, weights in ((encoder, encoder_state), (projections, projection_state)):
        _check_keys(source, module.state_dict(), weights)
        module.load_state_dict(weights, strict=True, assign=True)
        module.requires_grad_(False).eval()
    notes = []
    if not config.has_text_branch:
        notes.append(
            "it has no text branch: identity acts through attention only, and ID Prompt adds no identity tokens. "
            "Choose the text branch's file as text_branch for the complete method."
        )
    if not config.has_adapter_branch:
        notes.append(
            "it has no adapter branch: identity acts through ID Prompt only, and Apply ID Adapter has nothing to add. "
            "Choose the adapter branch's file as adapter and this one as text_branch for the complete method."
        )
    return Adapter(
        name=source,
        digest=state_digest(state, progress),
        method=uniid.METHOD,
        config=config,
        encoder=encoder,
        projections=projections,
        info=_describe(source, state, config, notes),
        notes=tuple(notes),
    )


def _branches(config: uniid.UniIDConfig) -> str:
    parts = [
        name
        for name, there in (("text", config.has_text_branch), ("adapter", config.has_adapter_branch))
        if there
    ]
    return " and ".join(parts) + (" branches" if len(parts) > 1 else " branch")


def _describe(source: str, state: Mapping[str, Tensor], config: uniid.UniIDConfig, notes: list[str]) -> str:
    count = sum(tensor.numel() for tensor in state.values())
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    lines = [f"{source}: UniID, {_branches(config)}, {count / 1e6:.1f} M parameters ({dtypes})"]
    if config.has_adapter_branch:
        lines.append(
            f"for {family_name(len(config.site_widths), config.context_width)}; {config.adapter_tokens} adapter tokens"
        )
    if config.has_text_branch:
        widths = ", ".join(
            f"{name} {width}" for name, width in zip(uniid.ENCODERS, config.text_widths, strict=False)
        )
        lines.append(f"{config.text_tokens} text tokens for the text encoders {widths}")
    lines.append(
        f"face recogniser: {config.recognizer or 'not recorded in the file (the published weights use iResNet-100, Glint360K)'}"
    )
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def _check_keys(source: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if problems := key_problems(expected, found):
        raise CheckpointError(
            f"{source}: not a complete UniID adapter: {problems}. Download or export the file again."
        )


def _read_adapter(path: Path) -> tuple[dict[str, Tensor], uniid.UniIDConfig, str]:
    if path.is_dir():
        inside = [path / name for name in FILES_IN_FOLDER if (path / name).is_file()]
        if not inside:
            raise CheckpointError(f"{path.name}: the folder holds neither {' nor '.join(FILES_IN_FOLDER)}.")
        path = inside[0]
    # The published files are all called pytorch_model.bin: name their folder too.
    source = f"{path.parent.name}/{path.name}" if path.name in FILES_IN_FOLDER else path.name
    tensors, metadata = read_tensors(path)
    if metadata.get("format") == FORMAT:
        _require_kind(metadata, "adapter", source)
        return tensors, _own_config(metadata, source), source
    state = formats.uniid_state(tensors, source)
    if not state:
        raise CheckpointError(f"{source}: {formats.describe_foreign(tensors)}.")
    return state, formats.uniid_config(state, source), source


def _require_kind(metadata: Mapping[str, str], kind: str, source: str) -> None:
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


def _own_config(metadata: Mapping[str, str], source: str) -> uniid.UniIDConfig:
    if metadata.get("method") != uniid.METHOD:
        raise CheckpointError(
            f"{source}: method {metadata.get('method')!r} is unknown to this release; update ComfyUI-IDAdapter."
        )
    try:
        stored: dict[str, Any] = json.loads(metadata["config"])
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
        defaults = dataclasses.asdict(uniid.UniIDConfig())
        if unknown := sorted(values.keys() - defaults.keys()):
            raise CheckpointError(
                f"{source}: unknown settings {unknown} in its config; update ComfyUI-IDAdapter."
            )
        for key, value in values.items():
            if type(value) is not type(defaults[key]) or not _is_setting(value):
                raise ValueError(f"{key} is {value!r}, the published value is {defaults[key]!r}")
        return uniid.UniIDConfig(**values)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, InputError) as error:
        raise CheckpointError(
            f"{source}: its config cannot be read ({error}); export the file again."
        ) from error


def _is_setting(value: object) -> bool:
    """Whether a value of a config is a text, a size, or several sizes."""
    sizes = value if isinstance(value, tuple) else (value,)
    return isinstance(value, str) or all(type(size) is int and size >= 0 for size in sizes)


def save_adapter(adapter: Adapter, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write an adapter in the project's own format. The write is atomic: a failure leaves no file behind.

    Args:
        dtype: convert floating weights to it; None keeps the file's (projections) and fp32 (encoder).

    Raises:
        CheckpointError: the file cannot be written.
    """
    state = {
        key: t.detach().cpu().to(dtype or t.dtype).contiguous() for key, t in adapter.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": "adapter",
        "method": adapter.method,
        "config": json.dumps(dataclasses.asdict(adapter.config)),
    }
    write_safetensors(state, metadata, Path(path))


def save_identity(identity: Identity, path: str | Path) -> None:
    """Write an identity file (safetensors). The write is atomic."""
    write_safetensors(_identity_tensors(identity), _identity_metadata(identity), Path(path))


def load_identity(path: str | Path) -> Identity:
    """Read an identity file.

    Raises:
        CheckpointError: unreadable, or not an identity of this project.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name}: not an identity file of this project; {formats.describe_foreign(tensors)}."
        )
    _require_kind(metadata, "identity", path.name)
    if missing := [key for key in ("method", "adapter", "recognizer") if key not in metadata]:
        raise CheckpointError(
            f"{path.name}: its metadata lacks {', '.join(missing)}; make the identity again from the photos."
        )
    text = {
        key.removeprefix("text_tokens."): t for key, t in tensors.items() if key.startswith("text_tokens.")
    }
    known = {"adapter_tokens", "adapter_tokens_uncond", *(f"text_tokens.{name}" for name in text)}
    odd = [key for key, t in tensors.items() if key not in known or t.ndim != 3 or t.shape[0] != 1]
    if odd or not tensors:
        raise CheckpointError(
            f"{path.name}: an identity holds tokens of shape (1, tokens, width); this file has {some(odd) or 'none'}. "
            "Make the identity again from the photos."
        )
    return Identity(
        adapter_tokens=tensors.get("adapter_tokens"),
        adapter_tokens_uncond=tensors.get("adapter_tokens_uncond"),
        text_tokens=text,
        method=metadata["method"],
        adapter=metadata["adapter"],
        recognizer=metadata["recognizer"],
        class_word=metadata.get("class_word", ""),
    )


def identical(one: Identity, other: Identity) -> bool:
    """Whether two identities hold the same tokens of the same adapter."""
    left, right = _identity_tensors(one), _identity_tensors(other)
    same_tensors = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return same_tensors and _identity_metadata(one) == _identity_metadata(other)


def _identity_tensors(identity: Identity) -> dict[str, Tensor]:
    tensors = {f"text_tokens.{name}": tensor for name, tensor in identity.text_tokens.items()}
    for name in ("adapter_tokens", "adapter_tokens_uncond"):
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
