"""The libraries of the `train` extra: imported when they are needed, and which ones there are."""

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
    """A module of the `train` extra.

    Raises:
        ConfigError: it is not installed, or cannot be imported; says how to get it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ConfigError(
            f"training and evaluation need {name.partition('.')[0]}, which cannot be imported: {error}. In the folder of "
            "ComfyUI-IDAdapter run `pip install -r requirements-train.txt` with the Python that has torch."
        ) from error


@contextlib.contextmanager
def progress_bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """What tells how far something is: called with what is done and all there is. Where nobody looks on there is no bar, but a
    line a minute for the machine's log."""
    told = time.monotonic()
    with require("tqdm").tqdm(desc=name, unit=unit, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal told
            bar.total = total
            bar.update(done - bar.n)
            if bar.disable and time.monotonic() - told > BETWEEN_LINES:
                told = time.monotonic()
                sys.stderr.write(f"{name}: {done} of {total}\n")

        yield progress


def versions() -> dict[str, str]:
    """Python, the platform and the libraries that a run's results may depend on, as far as they are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
