"""Definition of a method: UNet mechanisms, an encoder that makes identities for them, file layouts, and a training recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..mechanisms import Mechanisms
from ..mechanisms.text import TextKind
from ..published import PublishedFile
from ..schedule import RescaleSchedule
from ..strength import IN_PROPORTION, Dial
from ..types import FaceFeatures, Identity, Mix


@dataclass(frozen=True)
class AdapterContext:
    """The base model and settings that a new adapter is made for.

    text_widths: width of each text encoder of the base, by ComfyUI's names (l, g, h).
    vision: width and number of patches of the CLIP vision model, if one is configured.
    stage_widths: channels of the recogniser's four stages.
    branch: the branch of the method to train (`Recipe.branches`).
    settings: the user's settings for the method's config.
    """

    context_width: int
    site_widths: tuple[int, ...]
    site_heads: tuple[int, ...]
    text_widths: Mapping[str, int]
    vision: tuple[int, int] | None
    stage_widths: tuple[int, ...]
    branch: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class BatchFeatures:
    """Features of a training batch of B samples.

    embedding: (B, N + 1, 512), N references followed by the target; (B, 1, 512) if the target is its own reference.
    stages: four maps (B, C, side, side) of the target; patch_tokens: (B, N, P, d); class_embedding: (B, N, d).
    identity: (B,) bool; False where the identity is dropped.
    """

    embedding: Tensor
    stages: tuple[Tensor, ...]
    patch_tokens: Tensor | None
    class_embedding: Tensor | None
    identity: Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """Output of an encoder for B samples, with gradients.

    tokens: (B, T, D) for the UNet; None if the adapter has no tokens there.
    rows: (B,) bool, False where the adapter is skipped; None: it acts in all rows.
    text: per text encoder (B, n, width), as in `Identity.text_tokens`.
    """

    tokens: Tensor | None
    rows: Tensor | None
    text: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Training recipe of a method."""

    prompt: str  # default prompt of training samples; may contain `placeholders`
    known_by_target: bool  # the target photo is its own reference, instead of N other photos
    sizes: Callable[[AdapterContext], tuple[dict[str, Any], dict[str, Any]]]
    """Settings of a new config that the base fixes, and default sizes that suit it. Raises ConfigError for an impossible config."""
    encode: Callable[[Any, Any, BatchFeatures], Encoded]  # (encoder, config, features)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Published run settings by section, as far as they differ from the trainer's defaults."""
    branches: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Parts of an adapter that are trained in separate runs, each with defaults in addition to those above; empty: one run."""
    branch_of: Callable[[Any, str], Any] = lambda config, branch: config
    """(config, branch) -> the config of that branch alone. Raises MismatchError if the adapter lacks the branch."""
    start: Callable[[Any, Mapping[int, tuple[Tensor, Tensor]]], None] | None = None
    """(layers, to_k and to_v weights of the UNet's cross-attention by site): initialises new layers in place."""
    some_idle: bool = False  # in some batches a part of the parameters gets no gradient


class Config(Protocol):
    """Sizes of one adapter: a frozen dataclass of strings, integers and tuples of them, stored in its file."""

    recognizer: str
    """Digest of the face network used in training; empty: not recorded."""
    context_width: int
    site_widths: tuple[int, ...]
    non_weight_settings: Any
    """Names of the settings that affect an identity, or its use, but no weight."""

    @property
    def has_text_branch(self) -> bool: ...

    @property
    def has_adapter_branch(self) -> bool: ...


@dataclass(frozen=True)
class Needs:
    """Face features and text encoders that an adapter requires."""

    stages: bool = False  # inner maps of a torch recogniser, in addition to its embedding
    shallow_side: int = 0  # side that the first three maps are resized to; 0: unchanged
    vision: tuple[int, int] | None = None  # CLIP vision: width and number of patches
    views: tuple[str, ...] = ()  # views for CLIP vision besides the head (`faces.views.VIEWS`)
    text_widths: Mapping[str, int] = field(default_factory=dict)  # required text encoders, by ComfyUI's names
    all_text_encoders: bool = False  # the model must not have other text encoders


State = dict[str, Tensor]
UNCONDITIONAL = (
    "skip",
    "zeros",
)  # options on negative prompts: skip the adapter, or use the tokens of zeroed features


@dataclass(frozen=True)
class Layout:
    """A published layout of a method's weights, recognised by keys and shapes."""

    find: Callable[[Mapping[str, Tensor], str], State]
    """(state, source) -> the method's weights under the names of its own files; empty if the file has none."""
    config: Callable[[State, str], Any]
    """(weights, source) -> config with their sizes."""


@dataclass(frozen=True)
class ForeignFormat:
    """A kind of file that users mistake for an adapter."""

    pattern: str  # matches a key that only this kind has
    kind: str
    advice: str


@dataclass(frozen=True)
class Files:
    """File layouts of a method's weights."""

    layers_prefix: str  # prefix of the layers' weights in files; the encoder's weights have none
    layers_head: str  # beginning of the names of all layers' weights, and of no encoder weight
    layouts: tuple[Layout, ...] = ()
    foreign_formats: tuple[ForeignFormat, ...] = ()
    join: Callable[..., tuple[State, Any]] | None = None
    """Joins two files of one adapter; None if one file holds everything (see `adapter.load_adapter`)."""
    keep: Callable[[str, Any], bool] = lambda key, config: True
    """Whether a weight belongs to an adapter of this config."""


@dataclass(frozen=True)
class Method:
    """One method. It holds everything that differs between methods; code outside `methods` never checks for a method by name."""

    name: str  # in files and settings
    title: str  # display name in messages and lists
    config: type[Any]  # see `Config`; the defaults are the published sizes
    presets: Mapping[str, Any]  # configs by UNet family, for `convert --init`; {}: none
    needs: Callable[[Any], Needs]  # (config) -> inputs that the adapter reads
    mechanisms: Callable[[Any, Any], Mechanisms]  # (config, layers) -> mechanisms of the adapter
    encoder: Callable[[Any], nn.Module]  # (config) -> module that runs once per identity
    layers: Callable[[Any, Any], nn.Module]
    """(config, operations) -> the layers that act in the UNet. `operations` is `torch.nn` or a host's version of it, for layers
    that run at each step (`GatedLayers`); other layers ignore it."""
    initialise: Callable[
        [Any, Any, Any, int], None
    ]  # (encoder, layers, config, seed): initialises the weights for training
    require: Callable[[FaceFeatures, Any], None]
    """Raises MismatchError if features lack an input of the adapter."""
    encode: Callable[[Any, Any, FaceFeatures, Mix], Identity]  # (encoder, config, features, mix)
    files: Files
    text: TextKind | None  # kind of its `text_tokens`, if an adapter has any
    describe: Callable[[Any], list[str]]  # (config) -> description in lines
    notes: Callable[[Any, Mechanisms], tuple[str, ...]]  # (config, mechanisms) -> hints for the user
    parameters: Callable[
        [Any], Mapping[str, int]
    ]  # trained parameters of each part; empty for a method of one part
    references: Callable[[Any], int]  # maximum photos per person in Mix Face Features; 0: all
    usual_rescale: Callable[[Any], RescaleSchedule | None]
    """(config) -> the scales to begin with, for a method that is trained for identity alone and follows the prompt only with rescaling at
    inference; None for others."""
    recipe: Recipe | None  # training recipe; None: cannot be trained with this package
    weighs_tokens: bool = False  # whether its layers read `Identity.adapter_bias`
    dial: Dial = (
        IN_PROPORTION  # what a strength means for the scales, or for the weight of a method without them
    )
    published: tuple[PublishedFile, ...] = ()  # what a user needs for it, with the weights of its authors

    @property
    def usual_needs(self) -> Needs:
        """What an adapter of the published sizes reads."""
        return self.needs(self.config())


__all__ = [
    "AdapterContext",
    "BatchFeatures",
    "Config",
    "Encoded",
    "Files",
    "ForeignFormat",
    "Layout",
    "Method",
    "Needs",
    "Recipe",
    "State",
]
