"""The adapter that is trained: made for a base model or read from a file, its parameters, and back to what a file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats
from ..checkpoint import Adapter, build_adapter, initial_adapter, is_setting, load_adapter
from ..errors import ConfigError, InputError, MismatchError
from ..methods import METHODS, Config, idadapter, uniid
from ..methods.idadapter import IDAdapterConfig
from ..methods.uniid import SiteProjections, UniIDConfig
from ..sites import Site
from ..stable_diffusion.inject import fitting_blocks, transformer_blocks


@dataclass(frozen=True)
class Wanted:
    """What a run asks of its adapter, and what there is around it.

    text_widths: width of each text encoder of the base, by ComfyUI's names (l, g, h).
    vision: width and number of patches of the CLIP vision model, which IDAdapter reads.
    recognizer: what the adapter's file records of the face network.
    branch: which one of UniID's branches there is, "adapter" or "text".
    settings: of the method's config, over all other values.
    """

    method: str
    text_widths: Mapping[str, int]
    vision: tuple[int, int] | None
    recognizer: str
    branch: str
    settings: Mapping[str, Any]


def fresh_adapter(unet: Any, wanted: Wanted, seed: int) -> Adapter:
    """The start of a training: an adapter that leaves the base model's UNet exactly as it is, in fp32.

    UniID's K/V projections start as the UNet's own, as published.

    Args and errors: see `fresh_config`. `seed` decides all random weights.
    """
    config = fresh_config(unet, wanted)
    adapter = initial_adapter(config, f"a new {METHODS[wanted.method].title}", seed)
    if isinstance(adapter.layers, SiteProjections) and config.has_adapter_branch:
        copy_key_values(adapter.layers, unet)
        adapter = to_adapter(adapter, adapter.state_dict(), adapter.name)
    return adapter


def fresh_config(unet: Any, wanted: Wanted) -> Config:
    """The sizes of a new adapter: what depends on the base is read from the base, the rest are the method's own or the user's.

    For Stable Diffusion's real sizes they are those of `methods.idadapter.PRESETS`, and UniID's published ones.

    Args:
        unet: a diffusers UNet2DConditionModel of any width.

    Raises:
        ConfigError: a setting of another kind, one that contradicts the base, or a method that the base cannot have; names it.
        MismatchError: no UNet of diffusers, or of another kind.
    """
    settings, default = wanted.settings, METHODS[wanted.method].config()
    for name, value in settings.items():
        if not is_setting(value, getattr(default, name)):
            raise ConfigError(
                f"adapter.settings.{name} must be of the kind of {getattr(default, name)!r}, got {value!r}"
            )
    blocks = transformer_blocks(unet)
    facts: dict[str, Any] = {
        "context_width": next(iter(blocks.values())).attn2.to_k.in_features,
        "site_widths": tuple(block.attn2.to_k.out_features for block in blocks.values()),
        "recognizer": wanted.recognizer,
    }
    if wanted.method == idadapter.METHOD:
        more_facts, sizes = _idadapter(blocks, wanted)
    else:
        more_facts, sizes = _uniid(facts["context_width"], wanted)
    facts |= more_facts
    for name, value in settings.items():
        if name in facts and facts[name] != value:
            raise ConfigError(
                f"adapter.settings.{name} is {value!r}, but the base and the run decide it: it is {facts[name]!r}. Leave it out."
            )
    try:
        config: Config = dataclasses.replace(default, **{**sizes, **settings, **facts})
    except InputError as error:
        raise ConfigError(f"adapter.settings: {error}") from error
    return config


def _idadapter(blocks: Mapping[Site, Any], wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the base decides of an IDAdapter, and sizes that suit it."""
    text_widths = wanted.text_widths
    if wanted.vision is None:
        raise ConfigError("an IDAdapter reads CLIP vision; name the model as base.vision")
    encoders = tuple(name for name in idadapter.ENCODERS if name in text_widths)
    encoders = wanted.settings.get("text_encoders", encoders)  # fewer, or none: no identity word
    if missing := [name for name in encoders if name not in text_widths]:
        raise ConfigError(
            f"adapter.settings.text_encoders names {', '.join(missing)}, but the base has {', '.join(text_widths)}"
        )
    width, patches = wanted.vision
    facts = {
        "vision_width": width,
        "vision_patches": patches,
        "text_encoders": encoders,
        "text_widths": tuple(text_widths[name] for name in encoders),
        "site_heads": tuple(block.attn1.heads for block in blocks.values()),
    }
    sizes = {
        "mixer_heads": width // _head_width(width),
        "text_hidden": min(width, IDAdapterConfig.text_hidden),
    }
    return facts, sizes


def _uniid(context_width: int, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the base and the branch decide of a UniID adapter, and sizes that suit it."""
    text_widths = wanted.text_widths
    if wanted.branch == "adapter":
        width = min(context_width, UniIDConfig.adapter_width)
        width = wanted.settings.get("adapter_width", width)
        return {"text_widths": ()}, {"adapter_width": width, "head_width": _head_width(width)}
    names = uniid.ENCODERS[: len(text_widths)]
    if set(names) != set(text_widths):
        raise ConfigError(
            f"UniID's text branch is for the text encoders l and g of SD1.5 and SDXL; this base has {', '.join(text_widths)}. Set "
            "adapter.branch to 'adapter', or train an IDAdapter."
        )
    widths = tuple(text_widths[name] for name in names)
    sizes = {
        "text_hidden": min(2 * max(widths), UniIDConfig.text_hidden),
        "head_width": _head_width(*widths),
    }
    return {"text_widths": widths, "adapter_tokens": 0}, sizes


def _head_width(*widths: int) -> int:
    """Width of an attention head: 64, or less where the widths are no multiples of that."""
    return next(size for size in (64, 32, 16, 8, 4, 2, 1) if all(width % size == 0 for width in widths))


@torch.no_grad()
def copy_key_values(layers: SiteProjections, unet: Any) -> None:
    """Set UniID's K/V projections to the weights that the UNet's cross-attention has for the text."""
    for site, block in transformer_blocks(unet).items():
        projection: Any = layers.adapter_modules[str(site.index)]
        projection.to_k_ip.weight.copy_(block.attn2.to_k.weight)
        projection.to_v_ip.weight.copy_(block.attn2.to_v.weight)


def load_start(path: Path, unet: Any, wanted: Wanted) -> Adapter:
    """An adapter file to go on from, checked against the base. Of a UniID file with two branches, the one that is trained.

    A file that does not say which face network it was trained with gets the run's.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: it is of another method, or a setting contradicts it.
        MismatchError: it was made for another base, CLIP vision or face network, or lacks the branch; says what to change.
    """
    adapter = load_adapter(path)
    if adapter.method != wanted.method:
        raise ConfigError(
            f"{adapter.name} is an adapter of the method {adapter.method}, but adapter.method is {wanted.method}; set it to "
            f"{adapter.method}, or choose another file as adapter.start."
        )
    _require_settings(adapter, wanted.settings)
    config = _one_branch(adapter, wanted.branch)
    _require_base(dataclasses.replace(adapter, config=config), unet, wanted)
    if config.recognizer and wanted.recognizer and config.recognizer != wanted.recognizer:
        raise MismatchError(
            f"{adapter.name} was trained with the face recogniser {config.recognizer}, base.recognizer is {wanted.recognizer}. Name "
            "the one it was trained with as base.recognizer, or leave adapter.start empty."
        )
    config = dataclasses.replace(config, recognizer=config.recognizer or wanted.recognizer)
    if config == adapter.config:
        return adapter
    state = {key: tensor for key, tensor in adapter.state_dict().items() if _belongs(key, config)}
    return build_adapter(wanted.method, config, state, adapter.name)


def _require_settings(adapter: Adapter, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if getattr(adapter.config, name) != value:
            if name == "references":  # which comes from the data's
                raise ConfigError(
                    f"data.references is {value}, but {adapter.name} was made with {getattr(adapter.config, name)}, which its mixer "
                    "learned. Set data.references to that, or train a new adapter in another output.folder."
                )
            raise ConfigError(
                f"adapter.settings.{name} is {value!r}, but {adapter.name} was made with {getattr(adapter.config, name)!r}. "
                "Settings are for a new adapter: leave this one out, or leave adapter.start empty."
            )


def _one_branch(adapter: Adapter, branch: str) -> Config:
    """The config of what is trained in this run."""
    config: Config = adapter.config
    if not isinstance(config, UniIDConfig):
        return config
    there = config.has_adapter_branch if branch == "adapter" else config.has_text_branch
    if not there:
        raise MismatchError(
            f"{adapter.name} has the {uniid.branches(config)} only, but adapter.branch is {branch!r}. Choose the file of that "
            "branch as adapter.start, or train the branch that is there."
        )
    if branch == "adapter":
        return dataclasses.replace(config, text_widths=())
    return dataclasses.replace(config, adapter_tokens=0)


def _belongs(key: str, config: Config) -> bool:
    """Whether a weight of a file is one of an adapter of these sizes: of the branch that is there."""
    if not isinstance(config, UniIDConfig):
        return True
    return key.startswith(formats.ADAPTER_PREFIX if config.has_adapter_branch else formats.TEXT_PREFIX)


def _require_base(adapter: Adapter, unet: Any, around: Wanted) -> None:
    text_widths, vision = around.text_widths, around.vision
    fitting_blocks(unet, adapter)
    config = adapter.config
    if isinstance(config, UniIDConfig):
        own = dict(zip(uniid.ENCODERS, config.text_widths, strict=False))
        fits = not own or own == dict(text_widths)
    else:
        own = dict(zip(config.text_encoders, config.text_widths, strict=True))
        fits = own.items() <= text_widths.items()
    if not fits:
        raise MismatchError(
            f"{adapter.name} was made for the text encoders {_in_words(own)}, this base has {_in_words(text_widths)}. Set "
            "base.path to a model of the adapter's family, or leave adapter.start empty."
        )
    if isinstance(config, IDAdapterConfig):
        wanted = (config.vision_width, config.vision_patches)
        if vision != wanted:
            found = (
                "none is named"
                if vision is None
                else f"base.vision has width {vision[0]}, {vision[1]} patches"
            )
            raise MismatchError(
                f"{adapter.name} reads a CLIP vision model of width {wanted[0]} with {wanted[1]} patches, but {found}. Name the one "
                "it was trained with as base.vision, or leave adapter.start empty."
            )


def _in_words(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of width {width}" for name, width in widths.items()) or "(none)"


def trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    """All parameters of an adapter, as fp32 masters with gradients, under the names they have in files and in their order.

    Both modules are changed in place: the parameters are the ones that the encoder and the injected layers compute with.

    Some have no gradient in the first steps, which is right:
    - IDAdapter: while the gates are 0 only they, the K/V deltas and the identity word have one; the mixer and the rest of the
      gated adapters have from the second step on.
    - UniID's adapter branch: while `proj_out` is 0 only it and the bias of the norm after it have one; see
      `methods.uniid.initialise`.
    """
    for module in (adapter.encoder, adapter.layers):
        module.float().requires_grad_(True).train()
    prefix = METHODS[adapter.method].layers_prefix
    return {
        **dict(adapter.encoder.named_parameters()),
        **{prefix + name: parameter for name, parameter in adapter.layers.named_parameters()},
    }


def to_adapter(adapter: Adapter, state: Mapping[str, Tensor], name: str) -> Adapter:
    """A finished adapter with the weights of `state` (names as `trainable` gives them), to be saved by `checkpoint.save_adapter`.

    It shares memory with the state, so save it before the training goes on. The given adapter stays as it is.

    Raises:
        CheckpointError: weights are missing, too many, of other shapes, or not finite; names them.
    """
    weights = {key: tensor.detach() for key, tensor in state.items()}
    return build_adapter(adapter.method, adapter.config, weights, name)


__all__ = [
    "Wanted",
    "copy_key_values",
    "fresh_adapter",
    "fresh_config",
    "load_start",
    "to_adapter",
    "trainable",
]
