"""Lazy imports of the `train` extra's libraries, and their versions."""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType

from .errors import ConfigError

BETWEEN_LINES = 60.0  # seconds
_RECORDED = (
    "comfyui-idadapter",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "webdataset",
    "tensorboard",
    "imagehash",
    "pyarrow",
    "torchvision",
    "onnxruntime",
    "onnxruntime-gpu",
    "insightface",
    "opencv-python-headless",
)


def require(name: str) -> ModuleType:
    """Import a module of the `train` extra.

    Raises:
        ConfigError: it is not installed, or cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises RuntimeError
        raise ConfigError(
            f"training and evaluation need {name.partition('.')[0]}, which cannot be imported: {error}. In the folder of "
            "ComfyUI-IDAdapter run `pip install -r requirements-train.txt` with the Python that has torch."
        ) from error


@contextlib.contextmanager
def progress_bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Context manager with a callback (done, total) that shows progress: a bar on a terminal, else a log line per minute."""
    last_line = time.monotonic()
    with require("tqdm").tqdm(desc=name, unit=unit, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal last_line
            bar.total = total
            bar.update(done - bar.n)
            if bar.disable and time.monotonic() - last_line > BETWEEN_LINES:
                last_line = time.monotonic()
                sys.stderr.write(f"{name}: {done} of {total}\n")

        yield progress


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and all installed libraries that may affect the results of a run."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
