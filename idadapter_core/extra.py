"""The libraries of the `train` extra, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import ConfigError


def require(name: str) -> ModuleType:
    """A module of the `train` extra.

    Raises:
        ConfigError: it is not installed, or cannot be imported; says how to get it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ConfigError(
            f"training and evaluation need {name.partition('.')[0]}, which cannot be imported: {error}. In the folder of "
            "ComfyUI-IDAdapter run `pip install .[train]` with the Python that has torch."
        ) from error
