"""Modules of this pack under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary, ref

import comfy.model_management
import comfy.model_patcher
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

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


Loaded = TypeVar("Loaded")


class Live(Generic[Loaded]):
    """Loaded files that something still uses, by the stamp of their files: they need not be loaded again."""

    def __init__(self) -> None:
        self._live: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._handed_over: Any = None

    def get(self, stamp: str, load: Callable[[], Loaded], *, hand_over: bool = False) -> Loaded:
        """Return what is loaded already, or load it.

        Args:
            hand_over: keep it until it is asked for the next time, by the node whose result it becomes.
        """
        found: Loaded | None = self._live.get(stamp)
        if found is None:
            found = load()
            self._live[stamp] = found
        self._handed_over = found if hand_over else None
        return found


class Recent(Generic[Loaded]):
    """The last result for each tensor, as long as the tensor is kept: what was found in a photo is not looked for again.

    A result that holds its own tensor would keep it, and itself, for ever.
    """

    def __init__(self) -> None:
        self._results: Any = WeakTensorKeyDictionary()

    def get(
        self,
        tensor: Tensor,
        others: Sequence[object],
        settings: object,
        make: Callable[[], Loaded],
        tool: object = None,
    ) -> Loaded:
        """Return the last result for a tensor if it came from the same, or make it.

        Args:
            others: more objects that it depends on, compared by identity.
            settings: compared by value.
            tool: an object to compare by identity that is kept as long as the result.
        """
        known = self._results.get(tensor)
        if known is not None:
            its_others, its_settings, its_tool, result = known
            same = len(its_others) == len(others) and all(
                reference() is other for reference, other in zip(its_others, others, strict=True)
            )
            if same and its_settings == settings and its_tool is tool:
                found: Loaded = result
                return found
        made = make()
        self._results[tensor] = ([ref(other) for other in others], settings, tool, made)
        return made


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
