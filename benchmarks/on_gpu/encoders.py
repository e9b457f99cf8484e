"""Run time of the networks before the UNet: detector, face network, CLIP vision, and each method's encoder."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import networks as real
from benchmarks.on_gpu.detector import write_detector
from benchmarks.on_gpu.machine import device, synchronise
from benchmarks.on_gpu.parts import Report, Sizes
from benchmarks.on_gpu.subjects import adapter, features
from idadapter_core.faces.iresnet import IResNet

_TINY_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_PROVIDERS = {"CPUExecutionProvider": "CPU", "CUDAExecutionProvider": "CUDA"}


def networks(sizes: Sizes, report: Report) -> None:
    place = "CUDA" if device().type == "cuda" else "CPU"

    def tell(name: str, where: str, call: Callable[[], object]) -> None:
        report({"network": name, "on": where, "ms": 1e3 * seconds(call, sizes.repeats)})

    _detectors(sizes, tell)
    face = real.filled(IResNet((1, 1, 1, 1)) if sizes.tiny else real.recognizer(with_stages=True), device())
    crop = torch.randn(1, 3, 112, 112, device=device())
    tell("iResNet-100 on a face, fp32", place, lambda: face(crop))
    vision, dtype = _vision(sizes)
    head = torch.randn(1, 3, 224, 224, device=device(), dtype=dtype)
    tell("CLIP ViT-L/14 on a head", place, lambda: vision(pixel_values=head))
    for method, title in (("uniid", "UniID"), ("idadapter", "IDAdapter")):
        for photos in (1, 4):
            tell(f"{title}'s encoder, photos: {photos}, fp32", place, _encoding(method, sizes, photos))


def _encoding(method: str, sizes: Sizes, photos: int) -> Callable[[], object]:
    from ComfyUI_IDAdapter.idadapter_core import Mix

    seen, loaded = features(method, sizes, photos), adapter(method, sizes)
    return lambda: loaded.encode(seen, Mix())


def _vision(sizes: Sizes) -> tuple[Any, torch.dtype]:
    """The network and its precision: fp16 on a GPU, as ComfyUI loads it."""
    import transformers

    dtype = torch.float16 if device().type == "cuda" else torch.float32
    network = real.vision()
    if sizes.tiny:
        network = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_TINY_VISION))
    return real.filled(network, device(), dtype), dtype


def _detectors(sizes: Sizes, tell: Callable[[str, str, Callable[[], object]], None]) -> None:
    """Measure the detector on each onnxruntime provider that really runs it."""
    import numpy as np
    import onnxruntime

    side = 160 if sizes.tiny else 640
    picture = np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = write_detector(Path(folder) / "detector.onnx", side, divide=8 if sizes.tiny else 1)
        content = file.read_bytes()
    for provider in onnxruntime.get_available_providers():
        if provider not in _PROVIDERS:
            continue
        session = onnxruntime.InferenceSession(content, providers=[provider])
        if session.get_providers()[0] != provider:
            continue  # libraries are missing, so onnxruntime has used another provider
        tell(
            f"detector of SCRFD-10G's size at {side} px",
            _PROVIDERS[provider],
            lambda session=session: session.run(None, {"input": picture}),  # type: ignore[misc]
        )


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one warm-up call."""
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            synchronise()
            began = time.perf_counter()
            call()
            synchronise()
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
