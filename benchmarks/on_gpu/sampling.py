"""Sampling in ComfyUI with and without an adapter: time per step, synchronisation with the device, memory."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from benchmarks.on_gpu.machine import GIGABYTE, MEGABYTE, synchronise
from benchmarks.on_gpu.parts import Report, Sizes
from benchmarks.on_gpu.subjects import PLAIN, Subject, in_turns, sample, subjects
from tests.harness.memory import PeakMemory

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_SCALARS = ("aten::_local_scalar_dense",)
_PROFILED = 2  # difference in steps between the two samplings of a profile
_POLL = 0.002  # seconds


@dataclass
class Times:
    """Sampling times of a subject, in seconds."""

    steps: list[float] = field(default_factory=list)  # steps after the first one of each sampling
    first: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def before(self) -> float:
        """Additional time of the first step."""
        return statistics.median(self.first) - self.step


def steps(sizes: Sizes, report: Report) -> None:
    plain, times = _times(subjects(sizes), sizes)
    for name, measured in times.items():
        once = None if name == PLAIN else 1e3 * (measured.before - plain.before)
        report({**_against(plain, name, measured), "once per run, ms": once})


def compiled(sizes: Sizes, report: Report) -> None:
    import torch._dynamo
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    ready = [
        Subject(subject.name, TorchCompileModel.execute(subject.model, "inductor").result[0])
        for subject in subjects(sizes)
    ]
    # Tracing alone takes minutes on a CPU, however small the model.
    with torch._dynamo.config.patch(disable=sizes.tiny):
        plain, times = _times(ready, sizes)
    for name, measured in times.items():
        report(_against(plain, name, measured))


def _times(found: list[Subject], sizes: Sizes) -> tuple[Times, dict[str, Times]]:
    """Times of the plain model, and of all subjects by name."""
    times = {subject.name: Times() for subject in found}
    for subject in found:
        sample(subject.model, sizes, steps=2)  # loads, compiles, warms up
    for turn in in_turns(found, sizes.rounds):
        for subject in turn:
            _time(subject, sizes, times[subject.name])
    return times[PLAIN], times


def _against(plain: Times, name: str, measured: Times) -> dict[str, Any]:
    added = None if name == PLAIN else measured.step - plain.step
    return {
        "model": name,
        "ms per step": 1e3 * measured.step,
        "added ms": None if added is None else 1e3 * added,
        "added %": None if added is None else 100 * added / plain.step,
    }


def _time(subject: Subject, sizes: Sizes, times: Times) -> None:
    marks: list[float] = []

    def mark(*_: Any) -> None:
        synchronise()
        marks.append(time.perf_counter())

    mark()
    sample(subject.model, sizes, callback=mark)
    times.first.append(marks[1] - marks[0])
    times.steps += [after - before for before, after in zip(marks[1:-1], marks[2:], strict=True)]


def waits(sizes: Sizes, report: Report) -> None:
    for subject in subjects(sizes):
        sample(subject.model, sizes, steps=1)
        short, long = (_counted(subject, sizes, count) for count in (1, 1 + _PROFILED))
        report(
            {
                "model": subject.name,
                **{
                    f"{name} per step": (_sum(long, keys) - _sum(short, keys)) / _PROFILED
                    for name, keys in (("waits", _WAITS), ("scalars", _SCALARS), ("launches", _LAUNCHES))
                },
            }
        )


def _counted(subject: Subject, sizes: Sizes, count: int) -> Counter[str]:
    """Number of calls of each operator and each CUDA runtime function in a sampling."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        sample(subject.model, sizes, steps=count)
        synchronise()
    return Counter({event.key: event.count for event in profiler.key_averages()})


def _sum(counts: Counter[str], keys: tuple[str, ...]) -> int:
    return sum(counts[key] for key in keys)


def memory(sizes: Sizes, report: Report) -> None:
    import comfy.memory_management
    import comfy.model_management

    found = subjects(sizes)
    plain: Peak | None = None
    for subject in found:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        with Peak() as peak:
            sample(subject.model, sizes, steps=2)
            synchronise()
        plain = plain or peak
        report(
            {
                "model": subject.name,
                "peak allocated, GB": peak.allocated / GIGABYTE,
                "peak of the device, GB": None if peak.device is None else peak.device / GIGABYTE,
                "added, MB": (peak.total - plain.total) / MEGABYTE,
                "dynamic VRAM": bool(comfy.memory_management.aimdo_enabled),
            }
        )


class Peak:
    """Peak memory during a block, in bytes: allocated by PyTorch, and used on the device.

    Without CUDA, the process's resident memory beyond that at the start, where the system reports it.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self.device: int | None = None
        self._resident = PeakMemory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    @property
    def total(self) -> int:
        """The device's peak, which includes other allocators than PyTorch's; otherwise that of the process."""
        return self.allocated if self.device is None else self.device

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            synchronise()
            torch.cuda.reset_peak_memory_stats()
            self.device = 0
            self._thread.start()
        elif PeakMemory.is_known():
            self._resident.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device is not None:
            self._stop.set()
            self._thread.join()
            self.allocated = torch.cuda.max_memory_allocated()
        elif PeakMemory.is_known():
            self._resident.__exit__(kind, error, traceback)
            self.allocated = self._resident.bytes

    def _poll(self) -> None:
        while not self._stop.wait(_POLL):
            free, total = torch.cuda.mem_get_info()
            self.device = max(self.device or 0, total - free)
