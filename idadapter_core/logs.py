"""Logging of a run: one JSON line per log step, the same numbers in TensorBoard, and a progress bar.

<output.folder>/log.jsonl
<output.folder>/tensorboard/
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .extra import BETWEEN_LINES, require
from .files import write_lines

log = logging.getLogger(__name__)

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """The log of the main process. Lines after the step of a resumed run are dropped, because those steps are repeated."""

    def __init__(self, folder: Path, start: int, steps: int, tensorboard: bool) -> None:
        self._path = folder / LOG
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(folder) if int(line["step"]) <= start] if start else []
        write_lines(self._path, [f"{_json(line)}\n".encode() for line in kept])
        self._writer: Any = None
        self._hook = threading.excepthook
        if tensorboard:
            threading.excepthook = self._quietly
            writer = require("torch.utils.tensorboard").SummaryWriter
            try:
                self._writer = writer(str(folder / TENSORBOARD), purge_step=start + 1 if start else None)
            except OSError:
                threading.excepthook = self._hook
                raise
        bar = require("tqdm").tqdm
        self._bar = bar(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None)
        self._told = time.monotonic()

    def advance(self) -> None:
        """Count one finished step."""
        self._bar.update(1)

    def show(self, step: int, loss: float, images_per_second: float, seconds_left: float) -> None:
        """Show the newest numbers next to the progress bar, or without a terminal in a log line per minute."""
        self._bar.set_postfix(loss=f"{loss:.4g}", images_per_s=f"{images_per_second:.4g}")
        if self._bar.disable and time.monotonic() - self._told > BETWEEN_LINES:
            self._told = time.monotonic()
            sys.stderr.write(
                f"step {step} of {self._bar.total}: loss {loss:.4g}, {images_per_second:.4g} images/s, {remaining(seconds_left)} left\n"
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers, and lists or tables of numbers, of a step (counted from 1)."""
        line = {"step": step, "time": int(time.time()), **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{_json(line)}\n")
        if self._writer is not None:
            for name, value in _flat(values).items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Write a picture (H, W, 3), RGB uint8, to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                log.warning(
                    "%s: the last numbers cannot be written (%s); they are in %s",
                    self._path.parent / TENSORBOARD,
                    error,
                    LOG,
                )
            self._writer = None
            threading.excepthook = self._hook

    def _quietly(self, raised: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread, whose error is raised again at the next call."""
        if not isinstance(raised.exc_value, OSError) or not type(raised.thread).__module__.startswith(
            "tensorboard"
        ):
            self._hook(raised)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log. A truncated last line is skipped."""
    path = folder / LOG
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(_finite(line), ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Prepare a value for JSON: NaN and infinity become null, floats get eight significant digits."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested numbers to paths of names, for TensorBoard."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            flat |= _flat({f"{number:02}": entry for number, entry in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def remaining(seconds: float) -> str:
    """Format a duration: "2 h 05 min"."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


__all__ = ["LOG", "TENSORBOARD", "RunLog", "read_log", "remaining"]
