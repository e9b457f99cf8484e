"""The material of the contract suite, made for any method from its config class alone.

No method is named here. A config is made for a family by setting the fields that the family decides, recognised by their names,
and by shrinking all others. Face features hold everything that any method reads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from idadapter_core.adapter import Adapter, initial_adapter, save_adapter
from idadapter_core.errors import InputError
from idadapter_core.files import state_digest
from idadapter_core.identity import save_identity
from idadapter_core.methods import METHODS
from idadapter_core.methods.method import BatchFeatures
from idadapter_core.stable_diffusion.inject.blocks import transformer_blocks
from idadapter_core.training.adapters import to_adapter
from idadapter_core.types import MODES as MIX_MODES, FaceFeatures, Identity, Mix
from tests.golden import recipe
from tests.harness.shim import run_shim
from tests.tiny.acting import acting
from tests.tiny.bases import WIDTH as TEXT_WIDTH
from tests.tiny.diffusers_unet import CONFIGS as UNETS
from tests.tiny.features import RECOGNIZER, face, face_features

FAMILIES = tuple(UNETS)
TEXT_ENCODERS = {"sd15": ("l",), "sd21": ("h",), "sdxl": ("l", "g")}
POSITIONAL = ("l", "g")  # the text encoders of a config that lists widths without names
EMBEDDING_WIDTH = 512
VISION = (64, 16)  # width and patches of the made-up CLIP vision features
DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Case:
    """One method in one family."""

    method: str
    family: str

    def __str__(self) -> str:
        return f"{self.method}-{self.family}"


CASES = [Case(name, family) for name, method in METHODS.items() for family in FAMILIES]
METHOD_NAMES = tuple(METHODS)
FACE_NETWORK = RECOGNIZER  # that every adapter here was "trained" with


@dataclass(frozen=True)
class Sizes:
    """What surrounds an adapter, and how far its own sizes are shrunk."""

    site_widths: tuple[int, ...]
    site_heads: tuple[int, ...]
    context_width: int
    text_encoders: tuple[str, ...]
    text_width: int
    vision: tuple[int, int]
    width: int  # of every other layer of the adapter
    hidden: int  # of every MLP


@functools.cache
def family_sizes(family: str) -> Sizes:
    """The sizes around an adapter for the tiny base model of a family."""
    run_shim()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        blocks = transformer_blocks(UNet2DConditionModel(**UNETS[family])).values()
    return Sizes(
        site_widths=tuple(block.attn2.to_k.out_features for block in blocks),
        site_heads=tuple(block.attn1.heads for block in blocks),
        context_width=UNETS[family]["cross_attention_dim"],
        text_encoders=TEXT_ENCODERS[family],
        text_width=TEXT_WIDTH,
        vision=VISION,
        width=64,
        hidden=32,
    )


SMALLEST = Sizes((8,) * 3, (2,) * 3, 8, ("l",), 8, (8, 4), 8, 8)
"""For files in the repository: no UNet has these sizes."""


def config_of(method: str, sizes: Sizes) -> Any:
    """A config of a method with these sizes around it and everything else small."""
    usual = METHODS[method].config()
    names = {field.name for field in dataclasses.fields(usual)}
    encoders = sizes.text_encoders
    if "text_encoders" not in names and set(encoders) - set(POSITIONAL):
        encoders = ()  # the method cannot name them
    facts: dict[str, Any] = {
        "site_widths": sizes.site_widths,
        "site_heads": sizes.site_heads,
        "context_width": sizes.context_width,
        "text_encoders": encoders,
        "text_widths": (sizes.text_width,) * len(encoders),
        "embedding_width": EMBEDDING_WIDTH,
        "vision_width": sizes.vision[0],
        "vision_patches": sizes.vision[1],
        "recognizer": RECOGNIZER,
    }
    small = {
        name: _shrunk(name, getattr(usual, name), sizes)
        for name in names - facts.keys()
        if type(getattr(usual, name)) is int
    }
    return replace(usual, **small, **{name: fact for name, fact in facts.items() if name in names})


def _shrunk(name: str, usual: int, sizes: Sizes) -> int:
    if name.endswith("width"):
        return sizes.width
    return sizes.hidden if name.endswith("hidden") else min(usual, 2)


def fresh(case: Case, sizes: Sizes | None = None) -> Adapter:
    """An adapter as it is before the first step of its training."""
    return initial_adapter(config_of(case.method, sizes or family_sizes(case.family)), f"fresh {case}")


@functools.cache
def trained(case: Case) -> Adapter:
    """An adapter that acts with all of its weights, as if it were trained."""
    return acting(fresh(case))


def frozen(case: Case) -> Adapter:
    """An adapter whose weights depend on their names and shapes alone, not on a library's random numbers."""
    untrained = fresh(case)
    state = {
        name: recipe.weight(0, name, tensor.shape) if tensor.ndim > 1 else _vector(name, tensor)
        for name, tensor in untrained.state_dict().items()
    }
    return to_adapter(untrained, state, f"frozen {case}")


def _vector(name: str, like: Tensor) -> Tensor:
    drawn = 0.3 * recipe.value(0, name, like.shape or (1,)).reshape(like.shape)
    return 1 + drawn if name.endswith("weight") else drawn


def title_of(method: str) -> str:
    """What people call a method."""
    return METHODS[method].title


def features(seed: int, count: int = 1, vision: tuple[int, int] = VISION, **facts: Any) -> FaceFeatures:
    """Everything that any method reads, for `count` photos of a made-up woman; `facts` as in `face_features`."""
    plain = face_features(seed, count, **{"faces": [face(sex="F")] * count, **facts})
    width, patches = vision
    return replace(
        plain,
        patch_tokens=recipe.value(seed, "patch_tokens", (count, patches, width)),
        class_embedding=recipe.value(seed, "class_embedding", (count, width)),
    )


@dataclass(frozen=True)
class Learned:
    """What a recipe makes of a batch of two samples, whose identity is kept in the first and dropped in the second."""

    tokens: Tensor | None  # (2, T, D)
    acts: tuple[bool, bool]  # in which rows of the UNet there are tokens at all
    text: Mapping[str, Tensor]  # (2, n, width) each
    has_gradients: bool  # of everything that was made, down to the encoder's weights


def learned(adapter: Adapter) -> Learned | None:
    """A batch through the recipe of an adapter's method; None where there is none."""
    how = METHODS[adapter.method].recipe
    if how is None:
        return None
    whole = features(7, 2)
    count = 1 if how.known_by_target else 3
    batch = BatchFeatures(
        embedding=whole.embedding[:, None].expand(-1, count, -1).clone(),
        stages=whole.stages,
        patch_tokens=None
        if how.known_by_target
        else whole.patch_tokens[:, None].expand(-1, count - 1, -1, -1).clone(),  # type: ignore[index]
        class_embedding=None
        if how.known_by_target
        else whole.class_embedding[:, None].expand(-1, count - 1, -1).clone(),  # type: ignore[index]
        identity=torch.tensor([True, False]),
    )
    adapter.encoder.requires_grad_(True)
    made = how.encode(adapter.encoder, adapter.config, batch)
    outputs = [t for t in (made.tokens, *made.text.values()) if t is not None]
    sum(t.square().sum() for t in outputs).backward()  # type: ignore[union-attr]
    flowing = [p.grad is not None and bool(p.grad.isfinite().all()) for p in adapter.encoder.parameters()]
    adapter.encoder.zero_grad(set_to_none=True)
    adapter.encoder.requires_grad_(False)
    rows = (True, True) if made.rows is None else tuple(made.rows.tolist())
    return Learned(
        None if made.tokens is None else made.tokens.detach(),
        (bool(rows[0]), bool(rows[1])),
        {name: t.detach() for name, t in made.text.items()},
        any(flowing),
    )


def mixed(adapter: Adapter, mode: str) -> Identity | None:
    """Three photos by a mode; None where the method refuses it."""
    try:
        return adapter.encode(features(3, 3), Mix(mode))
    except InputError:
        return None


def bare(whole: FaceFeatures) -> FaceFeatures:
    """The embedding alone, as a face package without anything else gives it."""
    return replace(whole, stages=(), patch_tokens=None, class_embedding=None)


def tokens(identity: Any) -> dict[str, Tensor]:
    """All tensors of an identity by name."""
    found: dict[str, Tensor] = {f"text.{name}": value for name, value in identity.text_tokens.items()}
    for field in dataclasses.fields(identity):
        if isinstance(value := getattr(identity, field.name), Tensor):
            found[field.name] = value
    return found


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two identities hold the same tensors, bit by bit."""
    left, right = tokens(one), tokens(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tokens_digest(identity: Any) -> str:
    return state_digest({name: tensor.contiguous() for name, tensor in tokens(identity).items()})


def write_adapter(adapter: Adapter, path: Path) -> Path:
    save_adapter(adapter, path)
    return path


def write_identity(identity: Identity, path: Path) -> Path:
    save_identity(identity, path)
    return path


# --- files as such, read and written without the package ---


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(metadata))
    return path


def with_settings(metadata: Mapping[str, str], **settings: Any) -> dict[str, str]:
    """Metadata of an adapter file whose config has these settings, too."""
    return {**metadata, "config": json.dumps({**json.loads(metadata["config"]), **settings})}


__all__ = [
    "CASES",
    "DATA",
    "FACE_NETWORK",
    "FAMILIES",
    "METHOD_NAMES",
    "MIX_MODES",
    "SMALLEST",
    "VISION",
    "Case",
    "Sizes",
    "acting",
    "bare",
    "config_of",
    "family_sizes",
    "features",
    "fresh",
    "frozen",
    "read_file",
    "same_tokens",
    "title_of",
    "tokens",
    "tokens_digest",
    "trained",
    "with_settings",
    "write_adapter",
    "write_file",
    "write_identity",
]
