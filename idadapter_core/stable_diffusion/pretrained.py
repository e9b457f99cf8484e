"""Loads frozen networks of diffusers and transformers from files on disk. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..extra import require
from ..files import key_problems, own_weights, some

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_DIGEST_VALUES = 4096  # values read per tensor


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); complete the folder.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no valid JSON ({error}); get the file again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no JSON object; get the file again.")
    return content


def load_folder(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """Load a network of diffusers or transformers from its folder: config.json and weights, or only a variant such as fp16.

    Raises:
        CheckpointError: files are missing, cannot be read, or do not hold the whole network.
    """
    found = [_WEIGHTS.fullmatch(file.name) for file in folder.iterdir()] if folder.is_dir() else []
    variants = {match["variant"] for match in found if match}
    if not variants or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no {kind.__name__} here. The folder must hold config.json and the weights "
            "(diffusion_pytorch_model, model or pytorch_model, .safetensors or .bin); nothing is downloaded."
        )
    variant = None if None in variants else "fp16" if "fp16" in variants else min(map(str, variants))
    # Extra weights in the folder, such as a projection, are ignored.
    return _whole(
        kind, folder, ("missing",), pretrained=str(folder), variant=variant, local_files_only=True, **options
    )


def build_clip(kind: Any, config: Any, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """Build a CLIP network of transformers from a configuration and weights under their published names.

    The weight names inside its classes differ between releases; transformers converts the published names itself.

    Raises:
        CheckpointError: the weights do not match the configuration.
    """
    wrong = ("missing", "unexpected")
    return _whole(kind, name, wrong, pretrained=None, config=config, state_dict=dict(state))


def build_diffusers(
    kind: Any,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    name: str,
    convert: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] | None = None,
) -> nn.Module:
    """Build a network of diffusers from a configuration and weights under its names, or under names that `convert` translates.

    Raises:
        CheckpointError: the weights do not match the configuration.
    """
    with torch.device("meta"):
        network: Any = kind.from_config(dict(config))
    if convert is not None:
        state = convert(dict(state), network.config)
    if problems := key_problems(network.state_dict(), state):
        raise CheckpointError(
            f"{name}: these are not the weights of a {kind.__name__} of the expected sizes: {problems}. A model of other sizes "
            "needs its diffusers configuration: name a folder that has it in base.config."
        )
    network.load_state_dict(state, assign=True)
    built: nn.Module = network
    return built


def _whole(
    kind: Any, name: object, wrong: Sequence[str], *, pretrained: str | None, **options: Any
) -> nn.Module:
    network: nn.Module
    if kind.__module__.startswith("transformers"):  # prints a table, and its error gives no reason
        options["ignore_mismatched_sizes"] = True
        wrong = (*wrong, "mismatched")
    try:
        with _quietly():
            network, info = kind.from_pretrained(pretrained, output_loading_info=True, **options)
    except (
        Exception
    ) as error:  # damaged files raise many types: OSError, ValueError, RuntimeError, KeyError …
        reason = first_line(error)
        other = "" if pretrained else ", or name the configuration of a model of other sizes in base.config"
        raise CheckpointError(
            f"{name}: {kind.__name__} cannot be loaded: {reason}. Get the files again{other}."
        ) from error
    problems = []
    for problem in wrong:
        if keys := info.get(f"{problem}_keys"):
            problems.append(f"{len(keys)} {problem} ({some(sorted(map(_in_words, keys)))})")
    if problems:
        raise CheckpointError(
            f"{name}: not the weights of this {kind.__name__}: {'; '.join(problems)}. Get the files again."
        )
    return network


def _in_words(key: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    """Describe a weight by name, with both shapes if they do not match."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} is {tuple(found)} instead of {tuple(expected)}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' progress bars and its table of mismatched weights, which our errors name instead."""
    logs = require("transformers").utils.logging
    was_on, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if was_on:
            logs.enable_progress_bar()


def freeze(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Freeze a network in place and return it: no gradients, evaluation mode, on the device, and independent of its files."""
    # nn.Module's own `to`: that of diffusers warns about layers to keep in fp32, which these models do not have.
    frozen = nn.Module.to(network.requires_grad_(False).eval(), device=device, dtype=dtype)
    own_weights(frozen)
    return frozen


def from_library(module: str, name: str) -> Any:
    """Import a class or function of diffusers or transformers.

    Raises:
        ConfigError: the library is not installed, or cannot import one of its dependencies.
    """
    library = require(module)
    try:
        return getattr(library, name)
    except (ImportError, RuntimeError) as error:  # lazy imports fail here
        first: BaseException = error
        while cause := first.__cause__ or first.__context__:
            first = cause
        raise ConfigError(
            f"{module} cannot import {name}: {first_line(first)}. Where that is about torchvision, it does not fit the torch that is "
            "installed: install the one that does, or remove it; nothing here needs it."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).strip().split("\n")[0][:300].rstrip(".") or type(error).__name__


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of a SHA-256 over the names, the shapes and up to 4096 evenly spaced values of each tensor.

    Reading all values of a base model would take most of a minute, and two different trained models differ everywhere. Values are
    rounded to bfloat16 first, so the digest is the same whether a model was loaded in float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().flatten()
        stride = (
            values.numel() // _DIGEST_VALUES | 1
        )  # odd, so that it does not select the same columns in each row
        picked = values[::stride].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def published_names(network: nn.Module, tower: str) -> dict[str, Tensor]:
    """Return the weights of a CLIP network of transformers, without the prefix that some releases add."""
    return {name.removeprefix(f"{tower}."): value for name, value in network.state_dict().items()}
