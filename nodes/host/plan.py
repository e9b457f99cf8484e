"""The plan of a MODEL: the identities applied to it, with weight, start and end percent and mask. Immutable; a node puts a new plan on a clone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from comfy.utils import get_attr
from torch import Tensor

from ...idadapter_core import Adapter, Identity
from ...idadapter_core.schedule import RescaleSchedule
from ...idadapter_core.sites import Site, attention_sites
from .titles import APPLY

KEY = "idadapter"  # in transformer_options, model_conds and the wrappers' registry


class _Shared:
    """Base of objects that deepcopy shares: older ComfyUI deep-copies a model's options in each clone, weights included."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@dataclass(frozen=True, eq=False)
class Application(_Shared):
    """One Apply ID Adapter: an identity applied through an adapter with a strength, a window and a mask."""

    adapter: Adapter
    identity: Identity
    weight: float
    start_percent: float
    end_percent: float
    mask: Tensor | None  # (B, H, W) in 0..1
    node_id: str | None = None  # of the Apply ID Adapter that shows messages about it

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"{APPLY} (node {self.node_id})" if self.node_id else APPLY

    @property
    def masks(self) -> int:
        """Number of masks: 0, 1 for all latents, or a batch."""
        return 0 if self.mask is None else self.mask.shape[0]

    @property
    def switched_on(self) -> bool:
        """Whether the user's settings let it change anything."""
        masked_out = self.mask is not None and not self.mask.any()
        return self.weight != 0 and self.start_percent < self.end_percent and not masked_out

    @property
    def is_decoupled(self) -> bool:
        """Whether it acts inside cross-attention, in addition to the text."""
        return self.adapter.mechanisms.decoupled is not None

    @property
    def is_gated(self) -> bool:
        """Whether it acts between self-attention and cross-attention."""
        return self.adapter.mechanisms.gated is not None

    @property
    def acts(self) -> bool:
        """Whether its tokens can have any effect while sampling. Gates that training never opened have none."""
        is_open = any(map(any, self.adapter.mechanisms.openings.values()))
        return self.switched_on and (self.is_decoupled or is_open)


RescaleMode = Literal["normalized", "limit", "off"]


@dataclass(frozen=True)
class Rescale:
    """Normalized Identity Rescaling: its schedule, and whether it covers other packs' attention patches and gated adapters."""

    schedule: RescaleSchedule
    every_patch: bool = False
    gated: bool = False
    mode: RescaleMode = "normalized"
    node_id: str | None = None


@dataclass(frozen=True, eq=False)
class Plan(_Shared):
    """All settings of this pack on one MODEL."""

    sites: tuple[Site, ...]
    applications: tuple[Application, ...] = ()
    rescale: Rescale | None = None  # settings of the rescaling node; None without one

    @property
    def rescaling(self) -> Rescale | None:
        """The active rescaling; None if there is none or it is off."""
        return None if self.rescale is None or self.rescale.mode == "off" else self.rescale


def plan_of(model: Any) -> Plan:
    """Return the plan of a MODEL, or an empty one for its UNet."""
    plan = model.model_options.get("transformer_options", {}).get(KEY)
    # Modules compiled by another node have this part in their names.
    return plan or Plan(attention_sites(key.replace("_orig_mod.", "") for key in model.model_state_dict()))


def site_widths(model: Any, sites: tuple[Site, ...]) -> dict[str, tuple[int, int]]:
    """Return (channels, context width) of each site, read from the layers because quantised weights have other shapes."""
    unet = model.model.diffusion_model
    layers = {site.comfy_module: get_attr(unet, f"{site.comfy_module}.to_k") for site in sites}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def model_name(model: Any) -> str:
    """Return ComfyUI's name for the family of a MODEL, for messages."""
    return type(model.model.model_config).__name__
