"""Modules of this pack under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
from torch import nn

from ...idadapter_core import Adapter, FaceFeatures, Identity, Mix
from ...idadapter_core.errors import MismatchError
from ...idadapter_core.identity import move_identity


def manage(module: nn.Module, reload: Callable[..., Any], *arguments: Any) -> Any:
    """Return a ModelPatcher for a module. `reload(*arguments)` rebuilds it when ComfyUI needs an independent copy."""
    # Looked up at call time: ComfyUI rebinds the class when dynamic VRAM is on.
    patcher = comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (_rebuild, (reload, arguments))
    return patcher


def _rebuild(reload: Callable[..., Any], arguments: tuple[Any, ...], disable_dynamic: bool = False) -> Any:
    return reload(*arguments)


def require_same_file(path: Path, expected: str, found: str) -> None:
    """Raise MismatchError if the digests show that a reloaded file has different weights than before."""
    if found != expected:
        raise MismatchError(
            f"{path.name} has been replaced since it was loaded. Queue the prompt again, which loads the new file."
        )


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """Value of the ID_ADAPTER socket: the adapter, and its encoder under ComfyUI's management."""

    adapter: Adapter
    patcher: Any
    gates: Any = None  # ModelPatcher of IDAdapter's gated layers, loaded together with the model they act in

    def get_models(self) -> list[Any]:
        """Return the patchers, for ComfyUI's memory accounting of cached node outputs."""
        return [patcher for patcher in (self.patcher, self.gates) if patcher is not None]

    def encode(self, features: FaceFeatures, mix: Mix) -> Identity:
        """Encode an identity on ComfyUI's compute device and return it on the intermediate device."""
        comfy.model_management.load_models_gpu([self.patcher])
        identity = self.adapter.encode(features, mix)
        return move_identity(identity, comfy.model_management.intermediate_device())
