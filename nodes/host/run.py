"""The state of one sampling run: its steps, its identities, and the caches of the mechanisms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...idadapter_core.schedule import step_index
from .compilation import has_compiled_modules
from .plan import Application, Plan
from .rows import Handle


class Cache:
    """What a mechanism computes once for all steps of a run."""

    def __init__(self, run: Run):
        self.run = run


C = TypeVar("C", bound=Cache)


@dataclass(eq=False)
class Run:
    """Caches of one sampling run. Made when the run starts, dropped with it; shared by all its model calls."""

    plan: Plan
    sigmas: tuple[float, ...]
    latent_size: tuple[int, int]
    latents: int  # in the batch
    calls: int = 0  # model calls that came by
    evaluations: int = 0  # of the model with all conditionings, as the sampler asks for them
    missed: int = 0  # evaluations in which no model call came by

    _handles: dict[tuple[str, int, bool], Handle] = field(default_factory=dict)
    _windows: dict[int, tuple[float, float]] = field(default_factory=dict)
    _compiled: dict[Any, bool] = field(default_factory=dict)
    _caches: dict[Any, Cache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.current_size = self.latent_size  # of the whole latent now: some samplers enlarge it on the way

    def of(self, kind: type[C]) -> C:
        """The cache of that kind in this run: each belongs to the mechanism that it serves."""
        if kind not in self._caches:
            self._caches[kind] = kind(self)
        found = self._caches[kind]
        assert isinstance(found, kind)
        return found

    @property
    def handles(self) -> tuple[Handle, ...]:
        """All identities of the run, in each of their roles."""
        return tuple(self._handles.values())

    def clear(self) -> None:
        """Free everything that was computed; a finished run may still be referenced by a sampler's leftovers."""
        for known in (self._handles, self._windows, self._compiled, self._caches):
            known.clear()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step(self, sigma: float) -> int:
        return step_index(sigma, self.sigmas)

    def handle(self, application: Application, identity: Any, negative: bool) -> Handle | None:
        """The handle of an identity in a role; None where the adapter is skipped."""
        tokens = identity.adapter_tokens_uncond if negative else identity.adapter_tokens
        if tokens is None or not application.acts:
            return None
        key = (application.adapter.digest, id(identity), negative)
        if key not in self._handles:
            bias = None if negative else identity.adapter_bias
            self._handles[key] = Handle(application.adapter, tokens, bias)
        return self._handles[key]

    def in_window(self, application: int, model_sampling: Any, sigma: float) -> bool:
        """Whether an application acts at this noise level.

        Half open, so that of two windows that meet only one acts on the step between them.
        """
        if application not in self._windows:
            applied = self.plan.applications[application]
            percents = (applied.start_percent, applied.end_percent)
            start, end = (model_sampling.percent_to_sigma(percent) for percent in percents)
            self._windows[application] = (start, end)
        start, end = self._windows[application]
        return end < sigma <= start

    def has_compiled_modules(self, unet: Any) -> bool:
        """Whether anything in a UNet is compiled. Its modules are walked once per run."""
        if unet not in self._compiled:
            self._compiled[unet] = has_compiled_modules(unet)
        return self._compiled[unet]
