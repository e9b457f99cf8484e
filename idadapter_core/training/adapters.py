"""The adapter to train: create it for a base model or read it from a file, get its parameters, and save it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter, build_adapter, initial_adapter, is_setting, load_adapter
from ..errors import ConfigError, InputError, MismatchError
from ..methods import METHODS
from ..methods.method import AdapterContext
from ..stable_diffusion.inject import fitting_blocks, transformer_blocks

WEIGHTLESS = (
    "references",
    "rescale",
)  # settings that shape no weight: those of the run hold, whatever it starts from


@dataclass(frozen=True)
class AdapterRequirements:
    """Requirements of a run on its adapter, and the models around it.

    text_widths: width of each text encoder of the base, by ComfyUI's names (l, g, h).
    vision: width and number of patches of the CLIP vision model, if one is named.
    recognizer: record of the face network for the adapter's file.
    stage_widths: channels of its four stages.
    branch: the branch to train (`Recipe.branches`).
    settings: overrides of the method's config.
    """

    method: str
    text_widths: Mapping[str, int]
    vision: tuple[int, int] | None
    recognizer: str
    stage_widths: tuple[int, ...]
    branch: str
    settings: Mapping[str, Any]


def fresh_adapter(unet: Any, wanted: AdapterRequirements, seed: int) -> Adapter:
    """Make a new adapter, in fp32, that does not change the output of the base model's UNet.

    A method may start from the UNet's own weights (`Recipe.start`).

    Args and errors: see `fresh_config`. `seed` determines all random weights.
    """
    config = fresh_config(unet, wanted)
    method = METHODS[wanted.method]
    adapter = initial_adapter(config, f"a new {method.title}", seed)
    if method.recipe is not None and method.recipe.start is not None and config.has_adapter_branch:
        key_values = {
            site.index: (block.attn2.to_k.weight, block.attn2.to_v.weight)
            for site, block in transformer_blocks(unet).items()
        }
        method.recipe.start(adapter.layers, key_values)
        adapter = to_adapter(adapter, adapter.state_dict(), adapter.name)
    return adapter


def fresh_config(unet: Any, wanted: AdapterRequirements) -> Any:
    """The config of a new adapter: sizes from the base model, everything else from the method or the user.

    For Stable Diffusion's real sizes, these are the method's presets, or its published values.

    Args:
        unet: a diffusers UNet2DConditionModel of any width.

    Raises:
        ConfigError: a setting of the wrong type, one that contradicts the base, or a method that the base cannot have; names it.
        MismatchError: not a diffusers UNet, or one of another kind.
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
    recipe = METHODS[wanted.method].recipe
    if recipe is None:
        raise ConfigError(f"adapter.method: {METHODS[wanted.method].title} is not trained by this package")
    context = AdapterContext(
        context_width=facts["context_width"],
        site_widths=facts["site_widths"],
        site_heads=tuple(block.attn1.heads for block in blocks.values()),
        text_widths=wanted.text_widths,
        vision=wanted.vision,
        stage_widths=wanted.stage_widths,
        branch=wanted.branch,
        settings=wanted.settings,
    )
    more_facts, sizes = recipe.sizes(context)
    facts |= more_facts
    for name, value in settings.items():
        if name in facts and facts[name] != value:
            raise ConfigError(
                f"adapter.settings.{name} is {value!r}, but the base and the run decide it: it is {facts[name]!r}. Leave it out."
            )
    try:
        config = dataclasses.replace(default, **{**sizes, **settings, **facts})
    except InputError as error:
        raise ConfigError(f"adapter.settings: {error}") from error
    return config


def load_start(path: Path, unet: Any, wanted: AdapterRequirements) -> Adapter:
    """Read the adapter file to continue from, and check it against the base. Of two branches, only the one to train is kept.

    If the file does not record its face network, the run's is recorded. Settings that shape no weight are the run's: the number of
    reference photos, for example, is what the training teaches.

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
    method = adapter.kind
    try:
        config = (
            adapter.config
            if method.recipe is None
            else method.recipe.branch_of(adapter.config, wanted.branch)
        )
    except MismatchError as error:
        raise MismatchError(f"{adapter.name} {error}") from error
    _require_base(dataclasses.replace(adapter, config=config), unet, wanted)
    if config.recognizer and wanted.recognizer and config.recognizer != wanted.recognizer:
        raise MismatchError(
            f"{adapter.name} was trained with the face recogniser {config.recognizer}, base.recognizer is {wanted.recognizer}. Name "
            "the one it was trained with as base.recognizer, or leave adapter.start empty."
        )
    learned = {name: value for name, value in wanted.settings.items() if name in WEIGHTLESS}
    config = dataclasses.replace(config, recognizer=config.recognizer or wanted.recognizer, **learned)
    if config == adapter.config:
        return adapter
    state = {key: tensor for key, tensor in adapter.state_dict().items() if method.files.keep(key, config)}
    return build_adapter(wanted.method, config, state, adapter.name)


def _require_settings(adapter: Adapter, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name not in WEIGHTLESS and getattr(adapter.config, name) != value:
            raise ConfigError(
                f"adapter.settings.{name} is {value!r}, but {adapter.name} was made with {getattr(adapter.config, name)!r}. "
                "Settings are for a new adapter: leave this one out, or leave adapter.start empty."
            )


def _require_base(adapter: Adapter, unet: Any, requirements: AdapterRequirements) -> None:
    text_widths, vision = requirements.text_widths, requirements.vision
    fitting_blocks(unet, adapter)
    needs = adapter.kind.needs(adapter.config)
    own = needs.text_widths
    if not (not own or own == text_widths if needs.all_text_encoders else own.items() <= text_widths.items()):
        raise MismatchError(
            f"{adapter.name} was made for the text encoders {_in_words(own)}, this base has {_in_words(text_widths)}. Set "
            "base.path to a model of the adapter's family, or leave adapter.start empty."
        )
    if needs.vision is not None and vision != needs.vision:
        found = (
            "none is named" if vision is None else f"base.vision has width {vision[0]}, {vision[1]} patches"
        )
        raise MismatchError(
            f"{adapter.name} reads a CLIP vision model of width {needs.vision[0]} with {needs.vision[1]} patches, but {found}. Name the one "
            "it was trained with as base.vision, or leave adapter.start empty."
        )


def _in_words(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of width {width}" for name, width in widths.items()) or "(none)"


def trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    """All parameters of an adapter, as fp32 masters with gradients, with the names and order of adapter files.

    Both modules are changed in place: they compute with these parameters.

    Some parameters have no gradient at first, as intended:
    - while gates are 0, only the gates, deltas and the identity word have one; the inputs of gated layers follow in the second step;
    - while the last projection of an encoder is 0, only it and the bias of the norm after it have one (UniID's adapter branch).
    """
    for module in (adapter.encoder, adapter.layers):
        module.float().requires_grad_(True).train()
    prefix = adapter.kind.files.layers_prefix
    return {
        **dict(adapter.encoder.named_parameters()),
        **{prefix + name: parameter for name, parameter in adapter.layers.named_parameters()},
    }


def to_adapter(adapter: Adapter, state: Mapping[str, Tensor], name: str) -> Adapter:
    """Make an adapter with the weights of `state` (names as in `trainable`), to be saved by `adapter.save_adapter`.

    It shares memory with the state, so save it before the training continues. The given adapter is not changed.

    Raises:
        CheckpointError: weights are missing, unexpected, of the wrong shape, or not finite; names them.
    """
    weights = {key: tensor.detach() for key, tensor in state.items()}
    return build_adapter(adapter.method, adapter.config, weights, name)


__all__ = [
    "AdapterRequirements",
    "fresh_adapter",
    "fresh_config",
    "load_start",
    "to_adapter",
    "trainable",
]
