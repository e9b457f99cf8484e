"""The demo world in this process's ComfyUI: pictures by the pack's nodes, as a graph makes them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.harness.comfy import import_comfy, load_pack, pack_nodes

SIDE = 128
STEPS, CFG = 16, 3.0  # as in the claims
RESCALE = ("normalized", 0.8, 1.2, 0.5, 1.8, 0.1667, "ID adapters", False)
METHODS = {"uniid": "UniID", "idadapter": "IDAdapter", "faceid": "IP-Adapter FaceID"}
"""Options of Load Demo World, by the names of files."""

Pixels = npt.NDArray[np.uint8]


class DemoScene:
    """Everything that the demo world's graphs share, loaded once."""

    def __init__(self) -> None:
        import_comfy()
        load_pack()
        self._nodes = pack_nodes()
        with torch.inference_mode():
            loaded = {name: self._run("IDAdapterLoadDemoWorld", option) for name, option in METHODS.items()}
        self.model, self.clip, self.vae, self.vision, self.analyzer, _ = loaded["uniid"]
        self.adapters = {name: parts[5] for name, parts in loaded.items()}

    def _run(self, name: str, *inputs: Any) -> tuple[Any, ...]:
        result: tuple[Any, ...] = self._nodes[name].execute(*inputs).result
        return result

    def features(self, photos: Pixels) -> Any:
        """FACE_FEATURES of photos (N, H, W, 3), for all methods."""
        image = torch.from_numpy(photos).float() / 255
        with torch.inference_mode():
            return self._run(
                "IDAdapterExtractFaces", image, self.analyzer, "largest", 0, "error", self.vision
            )[0]

    def identity(self, method: str, features: Any, references: int = 0) -> Any:
        """IDENTITY of the features, from at most `references` of them (0: as many as the method likes)."""
        with torch.inference_mode():
            mixed = self._run(
                "IDAdapterMixFeatures", self.adapters[method], features, "auto", references, "", "reject"
            )
        return mixed[0]

    def applied(
        self,
        method: str,
        identity: Any,
        *,
        weight: float = 1.0,
        rescaled: bool = False,
        mask: torch.Tensor | None = None,
        model: Any = None,
    ) -> Any:
        """MODEL with the identity in it, on top of `model` (None: the plain one)."""
        start = self.model if model is None else model
        (found,) = self._run("IDAdapterApply", start, self.adapters[method], identity, weight, 0.0, 1.0, mask)
        return self._run("IDAdapterRescale", found, *RESCALE)[0] if rescaled else found

    def prompt(self, text: str, identity: Any = None, class_word: str = "auto") -> Any:
        """CONDITIONING of a text, with an identity in it if one is given."""
        import nodes as comfy_nodes

        with torch.inference_mode():
            if identity is not None:
                return self._run("IDAdapterPrompt", self.clip, identity, text, class_word, 1.0)[0]
            return comfy_nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def draw(
        self, model: Any, positive: Any, seed: int, *, batch: int = 1, width: int = SIDE, negative: Any = None
    ) -> Pixels:
        """Sample and decode pictures (batch, 128, width, 3)."""
        import nodes as comfy_nodes

        latents = {"samples": torch.zeros(batch, 4, SIDE // 8, width // 8)}
        with torch.inference_mode(), _without_progress():
            drawn = comfy_nodes.KSampler().sample(
                model, seed, STEPS, CFG, "euler", "simple", positive, negative or self.prompt(""), latents
            )[0]
            pictures = comfy_nodes.VAEDecode().decode(self.vae, drawn)[0]
        return (pictures * 255).round().to(torch.uint8).numpy()


@functools.cache
def demo_scene() -> DemoScene:
    """The scene of this process."""
    return DemoScene()


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """Keep ComfyUI's progress bar off the screen."""
    import comfy.utils

    before = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.set_progress_bar_enabled(False)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_enabled(before)
