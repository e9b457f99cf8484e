"""State of one sampling run: its steps, the windows of percentages in which identities act, and the caches of the mechanisms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...idadapter_core import Adapter
from ...idadapter_core.mechanisms import Mechanisms
from ...idadapter_core.schedule import step_index
from .compilation import has_compiled_modules
from .plan import Application, Plan
from .rows import Handle


class Cache:
    """Base of caches: results that a mechanism computes once for all steps of a run."""

    def __init__(self, run: Run):
        self.run = run


C = TypeVar("C", bound=Cache)


@dataclass(eq=False)
class Run:
    """State and caches of one sampling run. Created at its start, dropped at its end, shared by all its model calls."""

    plan: Plan
    sigmas: tuple[float, ...]
    latent_size: tuple[int, int]
    latents: int  # in the batch
    calls: int = 0  # model calls seen by the APPLY_MODEL wrapper
    evaluations: int = 0  # evaluations of all conditionings, as requested by the sampler
    missed: int = 0  # evaluations without any model call

    _handles: dict[tuple[str, int, bool], Handle] = field(default_factory=dict)
    _windows: dict[int, tuple[float, float]] = field(default_factory=dict)
    _compiled: dict[Any, bool] = field(default_factory=dict)
    _caches: dict[Any, Cache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.current_size = self.latent_size  # current size of the whole latent, which some samplers enlarge

    def of(self, kind: type[C]) -> C:
        """Return the cache of the given class in this run, creating it on first use."""
        if kind not in self._caches:
            self._caches[kind] = kind(self)
        found = self._caches[kind]
        assert isinstance(found, kind)
        return found

    @property
    def handles(self) -> tuple[Handle, ...]:
        """The handles of all identities of the run, one per role."""
        return tuple(self._handles.values())

    def groups(self, has: Callable[[Mechanisms], bool]) -> dict[tuple[Adapter, int], list[Handle]]:
        """Group the handles whose adapter has a mechanism: by adapter and number of tokens, to be projected together."""
        found: dict[tuple[Adapter, int], list[Handle]] = {}
        for handle in self.handles:
            if has(handle.adapter.mechanisms):
                found.setdefault((handle.adapter, handle.tokens.shape[1]), []).append(handle)
        return found

    def clear(self) -> None:
        """Free all caches, because leftovers of a sampler may still reference a finished run."""
        for known in (self._handles, self._windows, self._compiled, self._caches):
            known.clear()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step(self, sigma: float) -> int:
        return step_index(sigma, self.sigmas)

    def handle(self, application: Application, identity: Any, negative: bool) -> Handle | None:
        """Return the handle of an identity in a role, or None if the adapter is skipped."""
        tokens = identity.adapter_tokens_uncond if negative else identity.adapter_tokens
        if tokens is None or not application.acts:
            return None
        key = (application.adapter.digest, id(identity), negative)
        if key not in self._handles:
            bias = None if negative else identity.adapter_bias
            self._handles[key] = Handle(application.adapter, tokens, bias)
        return self._handles[key]

    def in_window(self, application: int, model_sampling: Any, sigma: float) -> bool:
        """Return whether an application acts at this noise level.

        Windows are half-open, so of two adjacent windows only one acts at the shared noise level.
        """
        if application not in self._windows:
            applied = self.plan.applications[application]
            percents = (applied.start_percent, applied.end_percent)
            start, end = (model_sampling.percent_to_sigma(percent) for percent in percents)
            self._windows[application] = (start, end)
        start, end = self._windows[application]
        return end < sigma <= start

    def has_compiled_modules(self, unet: Any) -> bool:
        """Return whether any module of a UNet is compiled. The modules are searched once per run."""
        if unet not in self._compiled:
            self._compiled[unet] = has_compiled_modules(unet)
        return self._compiled[unet]
