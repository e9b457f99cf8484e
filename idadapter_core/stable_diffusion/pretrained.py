"""Networks of diffusers and transformers from files on disk, frozen. Nothing is ever fetched."""

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
_DIGEST_VALUES = 4096  # of each tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: no such file, or no JSON object.
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
    """A network of diffusers or transformers from its folder: config.json and weights, also a variant such as fp16 alone.

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
    # What a folder holds beside this network, such as a projection, does not matter.
    return _whole(
        kind, folder, ("missing",), pretrained=str(folder), variant=variant, local_files_only=True, **options
    )


def build_clip(kind: Any, config: Any, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """A CLIP network of transformers from a configuration and weights under their published names.

    Its classes name their own weights differently from release to release; transformers itself knows how.

    Raises:
        CheckpointError: the weights are not those of this configuration.
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
    """A network of diffusers from a configuration and weights under its names, or under others that `convert` knows.

    Raises:
        CheckpointError: the weights are not those of this configuration.
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
    if kind.__module__.startswith("transformers"):  # which prints a table and raises without a reason
        options["ignore_mismatched_sizes"] = True
        wrong = (*wrong, "mismatched")
    try:
        with _quietly():
            network, info = kind.from_pretrained(pretrained, output_loading_info=True, **options)
    except (
        Exception
    ) as error:  # whatever the two libraries raise for damage: OSError, ValueError, RuntimeError, KeyError …
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
    """A weight's name; of one that does not fit its shapes, too."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} is {tuple(found)} instead of {tuple(expected)}"


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers draws a bar for each network that it loads, and prints a table of weights that do not fit: we say which."""
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
    """The network itself, ready for use: no gradients to its weights, evaluation mode, and independent of its files."""
    # nn.Module's own `to`: that of diffusers warns of layers to keep in fp32, of which these models have none.
    frozen = nn.Module.to(network.requires_grad_(False).eval(), device=device, dtype=dtype)
    own_weights(frozen)
    return frozen


def from_library(module: str, name: str) -> Any:
    """A class or function of diffusers or transformers.

    Raises:
        ConfigError: the library is not installed, or cannot import what it needs.
    """
    library = require(module)
    try:
        return getattr(library, name)
    except (ImportError, RuntimeError) as error:  # imported only now
        first: BaseException = error
        while cause := first.__cause__ or first.__context__:
            first = cause
        raise ConfigError(
            f"{module} cannot import {name}: {first_line(first)}. Where that is about torchvision, it does not fit the torch that is "
            "installed: install the one that does, or remove it; nothing here needs it."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's words, or its kind where it has none."""
    return str(error).strip().split("\n")[0][:300].rstrip(".") or type(error).__name__


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of a SHA-256 over the names, the shapes and up to 4096 evenly spaced values of each tensor.

    Reading all values of a base model would take most of a minute, and two models that anybody trained differ everywhere. Values
    are rounded to bfloat16 first, so a model has one digest whether it was loaded in float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().flatten()
        stride = (
            values.numel() // _DIGEST_VALUES | 1
        )  # odd, so that it does not pick the same columns of each row
        picked = values[::stride].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def published_names(network: nn.Module, tower: str) -> dict[str, Tensor]:
    """The weights of a CLIP network of transformers, without the prefix that some releases give to them."""
    return {name.removeprefix(f"{tower}."): value for name, value in network.state_dict().items()}
