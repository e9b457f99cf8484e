"""The demo world in this process's ComfyUI: pictures by the pack's nodes, as a graph makes them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from idadapter_core.demo_world.claims.subjects import SIZE, Pixels
from idadapter_core.demo_world.shipped import METHODS
from idadapter_core.demo_world.world import CFG, RESCALED, SAMPLER, STEPS
from idadapter_core.schedule import RescaleSchedule
from tests.harness.comfy import import_comfy, load_pack, pack_nodes


class DemoScene:
    """Everything that the demo world's graphs share, loaded once."""

    def __init__(self) -> None:
        import_comfy()
        load_pack()
        self._nodes = pack_nodes()
        self.model, self.clip, self.vae, self.vision, self.analyzer, _ = self._loaded("uniid")

    @functools.cache  # noqa: B019 - there is one scene for each process
    def _loaded(self, method: str) -> tuple[Any, ...]:
        with torch.inference_mode():
            return self._run("IDAdapterLoadDemoWorld", METHODS[method])

    def _adapter(self, method: str) -> Any:
        return self._loaded(method)[-1]

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

    def identity(self, method: str, features: Any) -> Any:
        """IDENTITY of the features."""
        with torch.inference_mode():
            mixed = self._run(
                "IDAdapterMixFeatures", self._adapter(method), features, "auto", 0, "", "reject"
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
        (found,) = self._run("IDAdapterApply", start, self._adapter(method), identity, weight, 0.0, 1.0, mask)
        return self._rescaled(found, RESCALED) if rescaled else found

    def _rescaled(self, model: Any, schedule: RescaleSchedule) -> Any:
        return self._run("IDAdapterRescale", model, "normalized", *vars(schedule).values(), "ID adapters")[0]

    def at_strength(self, method: str, identity: Any, strength: float) -> Any:
        """MODEL with the identity in it as strongly as Face Identity makes it."""
        weight, schedule = self._adapter(method).adapter.at_strength(strength)
        found = self.applied(method, identity, weight=weight)
        return found if schedule is None else self._rescaled(found, schedule)

    def prompt(self, text: str, identity: Any = None, class_word: str = "auto") -> Any:
        """CONDITIONING of a text, with an identity in it if one is given."""
        import nodes as comfy_nodes

        with torch.inference_mode():
            if identity is not None:
                return self._run("IDAdapterPrompt", self.clip, identity, text, class_word, 1.0)[0]
            return comfy_nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def draw(
        self, model: Any, positive: Any, seed: int, *, batch: int = 1, width: int = SIZE, negative: Any = None
    ) -> Pixels:
        """Sample and decode pictures (batch, 128, width, 3)."""
        import nodes as comfy_nodes

        latents = {"samples": torch.zeros(batch, 4, SIZE // 8, width // 8)}
        with torch.inference_mode(), _without_progress():
            drawn = comfy_nodes.KSampler().sample(
                model, seed, STEPS, CFG, SAMPLER, "simple", positive, negative or self.prompt(""), latents
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
