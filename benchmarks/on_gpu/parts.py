"""The measurements, their sizes and time limits. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Report = Callable[[dict[str, Any]], None]
"""Callback for one row of the part's table: column to value. Reported rows are kept, whatever happens afterwards."""


@dataclass(frozen=True)
class Sizes:
    """Real sizes, or tiny ones that test the benchmarks themselves."""

    tiny: bool
    family: str  # of the sampled UNet: sd15 or sdxl
    pixels: int  # side of the sampled images
    half: bool  # UNet and adapters in bf16, otherwise in fp32
    subjects: int  # number of adapters, besides the plain model
    steps: int  # per timed sampling
    rounds: int  # timed, interleaved rounds per variant
    repeats: int  # calls per network
    training: tuple[tuple[str, int], ...]  # family and resolution of each training step
    batch: int  # per training step


REAL = Sizes(False, "sdxl", 1024, True, 3, 10, 3, 20, (("sd15", 512), ("sdxl", 1024)), 4)
TINY = Sizes(True, "sd15", 64, False, 2, 3, 1, 1, (("sd15", 64),), 2)


@dataclass(frozen=True)
class Part:
    """One table. `where` is module:function within this package, called with sizes and a report callback."""

    name: str
    title: str
    where: str
    limit: float  # seconds for the whole process
    about: str = ""  # shown below the title in the documentation
    dynamic: bool = False  # with ComfyUI's dynamic VRAM

    def run(self, sizes: Sizes, report: Report) -> None:
        module, _, function = self.where.partition(":")
        getattr(importlib.import_module(f"{__package__}.{module}"), function)(sizes, report)


MACHINE = Part("machine", "Machine", "machine:machine", 60)
PARTS = (
    MACHINE,
    Part(
        "steps",
        "Added time per step",
        "sampling:steps",
        80,
        "SDXL at 1024 px in bf16, one picture with CFG. Medians of steps after the first, rounds take turns. UniID with 25 tokens and "
        "Normalized Identity Rescaling; IDAdapter with all gates open. *Once per run*: keys and values, made before the first step.",
    ),
    Part(
        "waits",
        "Waiting for the device",
        "sampling:waits",
        60,
        "Calls per step as PyTorch's profiler counts them: *waits* are CUDA's synchronisation calls, *scalars* tensors whose value "
        "Python asked for, *launches* kernel launches. The differences to the plain model are the adapter's.",
    ),
    Part(
        "parity",
        "CUDA against the CPU",
        "parity:parity",
        80,
        "The same seeded weights and noise, fp32 without TF32, two steps of Euler with CFG through ComfyUI: largest absolute difference "
        "of the latents, and the norm of the difference relative to that of the result.",
    ),
    Part(
        "networks",
        "Detector and encoders",
        "encoders:networks",
        50,
        "Median of a call. The detector is a network of SCRFD-10G's layers with random weights in onnxruntime; one call is one size of "
        "the detector's ladder.",
    ),
    Part(
        "memory",
        "Memory",
        "sampling:memory",
        60,
        "Peaks of one sampling with everything unloaded before. *Added* is over the plain model.",
    ),
    Part(
        "dynamic",
        "Memory with ComfyUI's dynamic VRAM",
        "sampling:memory",
        70,
        "As above; dynamic VRAM keeps weights outside PyTorch's allocator, so the device's peak counts.",
        dynamic=True,
    ),
    Part(
        "training",
        "A training step of IDAdapter",
        "training:training",
        100,
        "Forward, backward and AdamW in bf16 with gradient checkpointing, features and latents from the cache. Timesteps are spread "
        "evenly and one sample in ten has no identity, as in training; faces are cut as in CelebA-HQ.",
    ),
    Part(
        "compiled",
        "Added time per step on a compiled model",
        "sampling:compiled",
        150,
        "As *Added time per step*, with TorchCompileModel in front of the sampler. Steps in which an identity acts run uncompiled.",
    ),
)


def named(names: list[str]) -> tuple[Part, ...]:
    """The parts with these names, the machine first; all parts if no names are given.

    Raises:
        ValueError: there is no such part.
    """
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no part is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not names:
        return PARTS
    return (MACHINE, *(known[name] for name in names if name != MACHINE.name))
