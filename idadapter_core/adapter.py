"""Reads adapters in every layout of every method, checks that features, identities and base models fit them, and writes our own files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, InputError, MismatchError
from .faces.preview import portrait
from .files import key_problems, read_tensors, some, state_digest, write_safetensors
from .formats import FORMAT, FORMAT_VERSION, describe_foreign, require_kind
from .mechanisms import Mechanisms
from .mechanisms.deltas import nonzero_deltas
from .methods import METHODS, Config, Method, method_of
from .mixing import mean_direction
from .schedule import RescaleSchedule
from .sites import Site, family_name, is_known_family
from .types import FaceFeatures, Identity, Mix

FILES_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The trained weights of one method for one UNet family.

    `encoder` makes identities; `layers` act in the UNet. They are separate modules for the host's memory manager.
    """

    name: str  # for messages
    digest: str  # of all weights and of the config settings they do not show
    method: str
    config: Any  # the method's config class, see `methods.Config`
    encoder: nn.Module = field(repr=False)
    layers: nn.Module = field(repr=False)
    mechanisms: Mechanisms = field(repr=False)
    """The active mechanisms of the layers: without deltas that training never changed, with the openings of the gates."""
    info: str = ""  # description of the file
    notes: tuple[str, ...] = field(default=())  # hints for the user

    @property
    def kind(self) -> Method:
        """Its method."""
        return METHODS[self.method]

    @property
    def family(self) -> str:
        """Name of the UNet family it was made for."""
        return family_name(len(self.config.site_widths), self.config.context_width)

    @property
    def made_to_be_rescaled(self) -> bool:
        """Whether it needs normalized rescaling to work as intended."""
        return self.usual_rescale is not None

    @property
    def usual_rescale(self) -> RescaleSchedule | None:
        """The scales of normalized rescaling to begin with; None if it is not made to be rescaled."""
        return self.kind.usual_rescale(self.config)

    def at_strength(self, strength: float) -> tuple[float, RescaleSchedule | None]:
        """Return the weight and the scales that a strength means: 0 is the model alone, 1 what the adapter is usually used with.

        Raises:
            InputError: the strength is negative or not finite.
        """
        factor = self.kind.dial.factor(strength)
        usual = self.usual_rescale
        if usual is None or not factor:
            return factor, None
        return 1.0, usual.scaled(factor)

    def encode(self, features: FaceFeatures, mix: Mix | None = None) -> Identity:
        """Encode the photos of one person to an identity (see `encode` in `methods`).

        Raises:
            MismatchError: the features are not from the recogniser that the adapter was trained with.
        """
        self.kind.require(features, self.config)
        trained_with = self.config.recognizer
        if trained_with and features.recognizer and trained_with != features.recognizer:
            raise MismatchError(
                f"{self.name} was trained with another face recogniser than the one these features come from ({trained_with}, not "
                f"{features.recognizer}). Choose the recogniser it was trained with as `recognizer` in Load Face Analyzer."
            )
        mix = mix or Mix()
        identity = self.kind.encode(self.encoder, self.config, features, mix)
        chosen = self.with_own_number(mix)
        return dataclasses.replace(
            identity,
            adapter=self.digest,
            embedding=mean_direction(features, chosen),
            thumbnail=portrait(features, chosen),
        )

    def with_own_number(self, mix: Mix) -> Mix:
        """Return a mix that names how many photos it uses at most, by default the adapter's own number."""
        return dataclasses.replace(mix, references=mix.references or self.kind.references(self.config))

    def require_sites(
        self, sites: tuple[Site, ...], widths: Mapping[str, tuple[int, int]], model_name: str
    ) -> None:
        """Raise MismatchError unless the adapter fits a UNet.

        Args:
            sites: sites of the UNet (`sites.attention_sites`).
            widths: (channels, context width) of each site's to_k, by `Site.comfy_module`.
            model_name: name of the UNet's model in the message.
        """
        if not self.config.has_adapter_branch:
            return
        channels = tuple(widths[site.comfy_module][0] for site in sites)
        contexts = {widths[site.comfy_module][1] for site in sites}
        if channels == self.config.site_widths and contexts == {self.config.context_width}:
            return
        context = max(contexts)
        found = family_name(len(sites), context)
        if not is_known_family(len(sites), context):
            found = f"{model_name}: {found}"
        difference = ""
        if len(channels) == len(self.config.site_widths) and context == self.config.context_width:
            difference = " The two differ in the widths of their layers."
        raise MismatchError(
            f"{self.name} was made for {self.family}, this checkpoint is {found}.{difference} Load a checkpoint of the adapter's family, "
            "or an adapter that was made for this one."
        )

    def require_identity(self, identity: Identity, name: str) -> None:
        """Raise MismatchError unless this adapter made the identity. `name` is its name in the message."""
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
        """Return all weights under their names in files; those of UniID are the published names."""
        return _file_state(self.method, self.encoder, self.layers)


def _digest(config: Config, state: Mapping[str, Tensor], progress: Callable[[float], None] | None) -> str:
    """Digest of the weights, and of `non_weight_settings` that differ from their defaults: they change identities or their use."""
    weights = state_digest(state, progress)
    usual = type(config)()
    special = [(name, getattr(config, name)) for name in config.non_weight_settings]
    special = [(name, value) for name, value in special if value != getattr(usual, name)]
    return hashlib.sha256(f"{weights}{special}".encode()).hexdigest()[:16] if special else weights


def _file_state(method: str, encoder: nn.Module, layers: nn.Module) -> dict[str, Tensor]:
    prefix = METHODS[method].files.layers_prefix
    return {**encoder.state_dict(), **{prefix + key: t for key, t in layers.state_dict().items()}}


def load_adapter(
    path: str | Path,
    text_branch: str | Path | None = None,
    progress: Callable[[float], None] | None = None,
    operations: Any = torch.nn,
) -> Adapter:
    """Read an adapter from a file, or from a published folder (with or without its config.json).

    Args:
        path: our own safetensors, or any published or training layout (see the `files` of each method).
        text_branch: a second file whose text branch is added; UniID publishes its two branches separately.
        progress: called with the fraction done, 0 to 1; hashing a gigabyte of weights takes seconds.
        operations: module that provides the layers that run at every step: `torch.nn`, or a host's version of it.

    Raises:
        CheckpointError: unreadable, unrelated, incomplete, or with unexpected weights; names them.
        InputError: the files are not an adapter branch and a text branch: swapped, the same file twice, or of a one-file method.
    """
    method, state, config, source = _read_adapter(Path(path))
    if text_branch is not None:
        second_method, second, second_config, second_source = _read_adapter(Path(text_branch))
        for name, found in ((source, method), (second_source, second_method)):
            if METHODS[found].files.join is None:
                raise InputError(
                    f"{name} is an {METHODS[found].title} file, which holds everything; choose it as adapter and set text_branch "
                    "to 'none'."
                )
        join = METHODS[method].files.join
        if join is None or method != second_method:
            raise InputError(
                f"{source} is a file of {METHODS[method].title}, {second_source} of {METHODS[second_method].title}; choose two of one "
                "method, or set text_branch to 'none'."
            )
        state, config = join(
            (source, second_source), (state, second), (config, second_config), Path(path) == Path(text_branch)
        )
        source = f"{source} + {second_source}"
    return build_adapter(method, config, state, source, progress, operations)


def build_adapter(
    method: str,
    config: Config,
    state: Mapping[str, Tensor],
    source: str,
    progress: Callable[[float], None] | None = None,
    operations: Any = torch.nn,
) -> Adapter:
    """Build an adapter from its weights under their names in files.

    Raises:
        CheckpointError: weights are missing, unexpected, not finite, or of shapes that do not match the config.
    """
    parts = METHODS[method]
    with torch.device("meta"):
        encoder, layers = parts.encoder(config), parts.layers(config, operations)
        # A host's layers may have no weights before loading, so names and shapes come from plain torch layers.
        plain = parts.layers(config, torch.nn)
    # The encoder runs once per identity, in fp32 whatever the file holds; the layers keep the file's dtype.
    encoder_state = {
        key: tensor.float() for key, tensor in state.items() if not key.startswith(parts.files.layers_head)
    }
    layers_state = {
        key.removeprefix(parts.files.layers_prefix): tensor
        for key, tensor in state.items()
        if key.startswith(parts.files.layers_head)
    }
    if problems := key_problems(_file_state(method, encoder, plain), state):
        raise CheckpointError(
            f"{source}: not a complete {parts.title} file: {problems}. Download or export the file again."
        )
    if broken := [key for key, tensor in state.items() if not _is_finite(tensor)]:
        raise CheckpointError(
            f"{source}: {len(broken)} weights hold values that are not finite ({some(broken)}). The training that wrote it "
            "failed, or the file is damaged; choose an earlier one or download it again."
        )
    for module, weights in ((encoder, encoder_state), (layers, layers_state)):
        module.load_state_dict(weights, strict=True, assign=True)
        module.requires_grad_(False).eval()
    made = parts.mechanisms(config, layers)
    openings = {} if made.gated is None else made.gated.openings()
    text = parts.text if config.has_text_branch else None
    made = dataclasses.replace(made, deltas=nonzero_deltas(made.deltas), openings=openings, text=text)
    notes = parts.notes(config, made)
    return Adapter(
        name=source,
        digest=_digest(config, state, progress),
        method=method,
        config=config,
        encoder=encoder,
        layers=layers,
        mechanisms=made,
        info=_describe(source, method, state, config, notes),
        notes=notes,
    )


def _is_finite(tensor: Tensor) -> bool:
    # isfinite does not support 8-bit floats.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def initial_adapter(config: Config, name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Adapter:
    """Create an untrained adapter to start training from. It leaves the outputs of the UNet exactly unchanged.

    Args:
        name: name in messages.
        dtype: dtype of the layers; the encoder's values are rounded to it. Weights are allocated directly in this dtype, because an
            IDAdapter for SDXL has 2.1 G parameters.
    """
    parts = method_of(config)
    with torch.device("meta"):
        encoder, layers = parts.encoder(config), parts.layers(config, torch.nn)
    for module in (encoder, layers):
        module.to(dtype).to_empty(device="cpu")
    parts.initialise(encoder, layers, config, seed)
    return build_adapter(parts.name, config, _file_state(parts.name, encoder, layers), name)


def _describe(
    source: str, method: str, state: Mapping[str, Tensor], config: Config, notes: tuple[str, ...]
) -> str:
    count = sum(tensor.numel() for tensor in state.values())
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    first, *lines = METHODS[method].describe(config)
    head = f"{source}: {METHODS[method].title}, {first}, {count / 1e6:.1f} M parameters ({dtypes})"
    return "\n".join([head, *lines, *(f"Note: {note}" for note in notes)])


def identify_adapter(path: Path) -> tuple[Method, Config]:
    """Return the method and config of a file that `load_adapter` reads, without reading its weights.

    Raises:
        CheckpointError: unreadable or unrelated.
    """
    method, _, config, _ = _read_adapter(path, mapped=True)
    return METHODS[method], config


def _read_adapter(path: Path, *, mapped: bool = False) -> tuple[str, dict[str, Tensor], Config, str]:
    """Return method, weights, config, and the name of the file for messages. `mapped`: see `read_tensors`."""
    if path.is_dir():
        inside = [path / name for name in FILES_IN_FOLDER if (path / name).is_file()]
        if not inside:
            raise CheckpointError(f"{path.name}: the folder holds neither {' nor '.join(FILES_IN_FOLDER)}.")
        path = inside[0]
    # The published files are all called pytorch_model.bin: name their folder too.
    source = f"{path.parent.name}/{path.name}" if path.name in FILES_IN_FOLDER else path.name
    tensors, metadata = read_tensors(path, mapped=mapped)
    if metadata.get("format") == FORMAT:
        require_kind(metadata, "adapter", source)
        method, config = _own_config(metadata, source)
        return method, tensors, config, source
    for known in METHODS.values():
        for layout in known.files.layouts:
            if state := layout.find(tensors, source):
                return known.name, state, layout.config(state, source), source
    raise CheckpointError(f"{source}: {describe_foreign(tensors)}.")


def _own_config(metadata: Mapping[str, str], source: str) -> tuple[str, Config]:
    name = metadata.get("method")
    if name is None or name not in METHODS:
        raise CheckpointError(
            f"{source}: method {name!r} is unknown to this release; update ComfyUI-IDAdapter."
        )
    config_class = METHODS[name].config
    try:
        stored: dict[str, Any] = json.loads(metadata["config"])
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
        defaults = dataclasses.asdict(config_class())
        if unknown := sorted(values.keys() - defaults.keys()):
            raise CheckpointError(
                f"{source}: unknown settings {unknown} in its config; update ComfyUI-IDAdapter."
            )
        for key, value in values.items():
            if not is_setting(value, defaults[key]):
                raise ValueError(f"{key} is {value!r}, the published value is {defaults[key]!r}")
        config = config_class(**values)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, InputError) as error:
        raise CheckpointError(
            f"{source}: its config cannot be read ({error}); export the file again."
        ) from error
    return name, config


def is_setting(value: object, default: object) -> bool:
    """Return whether a config value has the type of its default: a string, a size (int >= 0), or a tuple of either."""
    if type(value) is not type(default):
        return False
    if isinstance(value, tuple) and isinstance(default, tuple):
        return all(is_setting(entry, default[0]) for entry in value)
    return isinstance(value, str) or (type(value) is int and value >= 0)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter in the project's own format. The write is atomic: a failure leaves no file behind.

    Args:
        dtype: dtype to convert the weights to; None keeps the file's (layers) and fp32 (encoder).
        weights: replace the adapter's own, under the names of `Adapter.state_dict`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    state = {
        key: t.detach().cpu().to(dtype or t.dtype).contiguous()
        for key, t in (adapter.state_dict() if weights is None else weights).items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": "adapter",
        "method": adapter.method,
        "config": json.dumps(dataclasses.asdict(adapter.config)),
    }
    write_safetensors(state, metadata, Path(path))
