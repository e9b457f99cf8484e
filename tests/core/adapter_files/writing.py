"""Shared by the tests of adapter and identity files: weights as they are published, and files written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

State = dict[str, Tensor]


def write(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def read_own(path: Path) -> tuple[State, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def behind(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def bare(state: State) -> State:
    return {key.partition(".")[2]: tensor for key, tensor in state.items()}
