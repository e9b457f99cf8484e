"""What a method is: mechanisms that act in the UNet, an encoder that makes identities for them, file layouts, a training recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..mechanisms import Mechanisms
from ..mechanisms.text import TextKind
from ..types import FaceFeatures, Identity, Mix


@dataclass(frozen=True)
class Around:
    """What a new adapter is made for.

    text_widths: width of each text encoder of the base, by ComfyUI's names (l, g, h).
    vision: width and number of patches of the CLIP vision model, where one is named.
    branch: which one of the method's branches is trained (`Recipe.branches`).
    settings: of the method's config, as the user wants them.
    """

    context_width: int
    site_widths: tuple[int, ...]
    site_heads: tuple[int, ...]
    text_widths: Mapping[str, int]
    vision: tuple[int, int] | None
    branch: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Seen:
    """Features of B samples of a training.

    embedding: (B, N + 1, 512), of N references and then of the target; (B, 1, 512) where the target is the only reference.
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
    """What an encoder made of B samples, with gradients.

    tokens: (B, T, D) for what acts in the UNet; None where nothing does.
    rows: (B,) bool, False where the adapter is skipped; None: it acts in all rows.
    text: per text encoder (B, n, width), as in `Identity.text_tokens`.
    """

    tokens: Tensor | None
    rows: Tensor | None
    text: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a method is trained."""

    prompt: str  # of samples, where the run names none; may leave open what `prompts` fills in
    known_by_target: bool  # a person is known by the target itself, not by N other photos
    sizes: Callable[[Around], tuple[dict[str, Any], dict[str, Any]]]
    """Settings of a new config that the surroundings decide, and others that suit them. Raises ConfigError where they cannot be."""
    encode: Callable[[Any, Any, Seen], Encoded]  # (encoder, config, features)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of a run by section, as published, where they differ from the trainer's."""
    branches: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Parts of an adapter that are trained in runs of their own, each with its defaults beside those above; empty: all at once."""
    branch_of: Callable[[Any, str], Any] = lambda config, branch: config
    """(config, branch) -> the config of that branch alone. Raises MismatchError where an adapter has none."""
    start: Callable[[Any, Mapping[int, tuple[Tensor, Tensor]]], None] | None = None
    """(layers, to_k and to_v weights of the UNet's cross-attention by site): changes fresh layers in place."""
    some_idle: bool = False  # a batch may leave parts of it without a gradient


class Config(Protocol):
    """The sizes of one adapter: a frozen dataclass of texts, whole numbers and tuples of them, written into its file."""

    recognizer: str
    """Digest of the face network it was trained with; empty: not recorded."""
    context_width: int
    site_widths: tuple[int, ...]
    unseen: Any
    """Names of the settings that change an identity, or its use, and show in no weight."""

    @property
    def has_text_branch(self) -> bool: ...

    @property
    def has_adapter_branch(self) -> bool: ...


@dataclass(frozen=True)
class Needs:
    """What an adapter reads of a face, and which text encoders it was made for."""

    stages: bool = False  # the inner maps of a torch recogniser, beside its embedding
    shallow_side: int = 0  # side at which the first three of them are read; 0: their own
    vision: tuple[int, int] | None = None  # CLIP vision: its width and its number of patches
    views: tuple[str, ...] = ()  # of CLIP vision, beside the head (`faces.views.VIEWS`)
    text_widths: Mapping[str, int] = field(default_factory=dict)  # by ComfyUI's names; those it must have
    all_text_encoders: bool = False  # the model may have no others


State = dict[str, Tensor]
UNCONDITIONAL = (
    "skip",
    "zeros",
)  # what adapters may do on negative prompts: nothing, or the tokens of zeroed features


@dataclass(frozen=True)
class Layout:
    """A published layout of a method's weights, told by keys and shapes."""

    find: Callable[[Mapping[str, Tensor], str], State]
    """(state, source) -> the method's weights under the names of its own files; empty where the file holds none."""
    config: Callable[[State, str], Any]
    """(weights, source) -> their sizes."""


@dataclass(frozen=True)
class Foreign:
    """Files that people take for adapters."""

    pattern: str  # of a key that only this kind has
    kind: str
    advice: str


@dataclass(frozen=True)
class Files:
    """How a method's weights lie in files."""

    layers_prefix: (
        str  # what stands before the names of the layers' weights; the encoder's have nothing before them
    )
    layers_head: str  # what the names of all layers' weights begin with, and none of the encoder's
    layouts: tuple[Layout, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    join: Callable[..., tuple[State, Any]] | None = None
    """Two files of one adapter; None where one file holds everything (see `adapter.load_adapter`)."""
    keep: Callable[[str, Any], bool] = lambda key, config: True
    """Whether a weight belongs to an adapter of this config."""


@dataclass(frozen=True)
class Method:
    """One method. Everything that differs between methods is in here, and nothing outside `methods` asks for one by name."""

    name: str  # in files and settings
    title: str  # for people, in messages and lists
    config: type[Any]  # see `Config`; made without arguments it has the published sizes
    presets: Mapping[str, Any]  # configs by UNet family, for `convert --init`; {}: none are offered
    needs: Callable[[Any], Needs]  # what an adapter with this config reads
    mechanisms: Callable[[Any, Any], Mechanisms]  # (config, layers): the parts it has
    encoder: Callable[[Any], nn.Module]  # (config): makes identities, once for each
    layers: Callable[[Any, Any], nn.Module]
    """(config, operations): what acts in the UNet. `operations` is `torch.nn` or a host's version of it, for layers that run at
    each step (`GatedLayers`); others leave it aside."""
    initialise: Callable[
        [Any, Any, Any, int], None
    ]  # (encoder, layers, config, seed): the start of a training
    require: Callable[[FaceFeatures, Any], None]
    """Raises MismatchError where features lack what an adapter reads."""
    encode: Callable[[Any, Any, FaceFeatures, Mix], Identity]  # (encoder, config, features, mix)
    files: Files
    text: TextKind | None  # how its `text_tokens` act, where an adapter has any
    describe: Callable[[Any], list[str]]  # an adapter of these sizes, in lines
    notes: Callable[[Any, Mechanisms], tuple[str, ...]]  # what a user should know before using it
    parameters: Callable[
        [Any], Mapping[str, int]
    ]  # trained parameters of each part; empty for a method of one part
    references: Callable[[Any], int]  # how many photos of a person Mix Face Features chooses at most; 0: all
    made_to_be_rescaled: bool
    """Trained for identity alone, so that only rescaling at inference leaves the prompt a say."""
    recipe: Recipe | None  # how it is trained; None: not by this package


__all__ = [
    "Around",
    "Config",
    "Encoded",
    "Files",
    "Foreign",
    "Layout",
    "Method",
    "Needs",
    "Recipe",
    "Seen",
    "State",
]
