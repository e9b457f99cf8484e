"""The state of one sampling run: which rows carry which identity, and what was computed once for all its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import torch
import torch.nn.functional as F
from torch import Tensor

from ...idadapter_core import Adapter
from ...idadapter_core.attention import PreparedIdentity, prepare_identity, repeat_copies
from ...idadapter_core.errors import InputError
from ...idadapter_core.methods.idadapter import GateIdentity
from ...idadapter_core.schedule import step_index
from ...idadapter_core.sites import Site
from .compilation import has_compiled_modules
from .foreign import ForeignSlot
from .plan import Application, Plan


@dataclass(frozen=True, eq=False)
class Handle:
    """Host-side tokens of one identity in one role. Compared by identity, so it can key caches without touching tensors."""

    adapter: Adapter
    tokens: Tensor  # (1, T, D)
    bias: Tensor | None = None  # (1, T), see `Identity.adapter_bias`


@dataclass(frozen=True)
class Row:
    """One latent row of a model call."""

    handles: tuple[Handle | None, ...]  # one per application of the plan
    area: (
        tuple[int, ...] | None
    )  # height, width, y, x in the latent, where the conditioning covers only a part
    image: int  # which latent of the batch


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows that one attention call serves: an equal number of rows for each of the handles."""

    start: int
    stop: int
    handles: tuple[Handle, ...]


@dataclass(frozen=True)
class Span:
    """Neighbouring rows in which the same identities act, with the number of the application of each."""

    start: int
    stop: int
    handles: tuple[tuple[int, Handle], ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of one model call, as `RowTags.concat` hands them to the model."""

    run: Run
    rows: tuple[Row, ...]

    def to(self, *_: Any, **__: Any) -> Rows:
        """ComfyUI moves conditioning values to the device of the call; rows live on the host."""
        return self


class RowTags(comfy.conds.CONDRegular):
    """A conditioning value without a tensor: says for each latent row which identity it carries.

    Travelling with the conditioning keeps rows right under every guider, area, mask and batch split.
    """

    def __init__(
        self,
        run: Run,
        handles: tuple[Handle | None, ...],
        text_positions: tuple[int, ...],
        rows: tuple[Row, ...] = (),
    ):
        super().__init__(None)
        self.run = run
        self.handles = handles
        self.text_positions = text_positions
        self.rows = rows

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **_: Any) -> RowTags:
        region = tuple(area) if area is not None else None
        rows = tuple(Row(self.handles, region, image) for image in range(batch_size))
        return RowTags(self.run, self.handles, self.text_positions, rows)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, RowTags) and other.run is self.run

    def concat(self, others: Sequence[RowTags]) -> Rows:
        return Rows(self.run, tuple(row for tags in (self, *others) for row in tags.rows))

    def size(self) -> list[int]:
        tokens = sum(handle.tokens.shape[1] for handle in self.handles if handle is not None)
        return [max(len(self.rows), 1), tokens, 1]


@dataclass(eq=False)
class Run:
    """Caches of one sampling run. Made when the run starts, dropped with it; shared by all its model calls."""

    plan: Plan
    sigmas: tuple[float, ...]
    latent_size: tuple[int, int]
    latents: int  # in the batch
    _handles: dict[Any, Handle] = field(default_factory=dict)
    _windows: dict[int, tuple[float, float]] = field(default_factory=dict)
    _compiled: dict[Any, bool] = field(default_factory=dict)
    _projected: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    _prepared: dict[Any, PreparedIdentity] = field(default_factory=dict)
    _segments: dict[Any, tuple[Segment, ...]] = field(default_factory=dict)
    _spans: dict[Any, tuple[Span, ...]] = field(default_factory=dict)
    _masks: dict[Any, Tensor] = field(default_factory=dict)
    foreign: dict[int, ForeignSlot] = field(
        default_factory=dict
    )  # by id of the replacement, which it keeps alive
    chains: dict[Any, Any] = field(default_factory=dict)
    gate_patch: Any = None
    calls: int = 0  # model calls that came by
    evaluations: int = 0  # of the model with all conditionings, as the sampler asks for them
    missed: int = 0  # evaluations in which no model call came by
    placed: bool = True  # every gated layer that ran could tell which it is

    def __post_init__(self) -> None:
        self.current_size = self.latent_size  # of the whole latent now: some samplers enlarge it on the way

    def clear(self) -> None:
        """Free everything that was computed; a finished run may still be referenced by a sampler's leftovers."""
        for cache in (
            self._handles,
            self._windows,
            self._compiled,
            self._projected,
            self._prepared,
            self._segments,
            self._spans,
            self._masks,
            self.foreign,
            self.chains,
        ):
            cache.clear()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step(self, sigma: float) -> int:
        return step_index(sigma, self.sigmas)

    def foreign_slot(self, replacement: Any) -> ForeignSlot:
        """The state of another pack's replacement in this run."""
        return self.foreign.setdefault(id(replacement), ForeignSlot(replacement))

    def settle_trials(self) -> None:
        """Read what was found out about other packs' replacements: one wait for all of them."""
        tried = [(slot, slot.trial) for slot in self.foreign.values() if slot.trial is not None]
        if tried:
            outcomes = torch.stack([trial.to(tried[0][1].device) for _, trial in tried]).tolist()
            for (slot, _), (live, additive, overridden) in zip(tried, outcomes, strict=True):
                slot.settle(live, additive, overridden)

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

    def segments(self, rows: tuple[Row, ...], application: int) -> tuple[Segment, ...]:
        """The rows of one application in as few attention calls as possible; rows without an identity are left out."""
        handles = tuple(row.handles[application] for row in rows)
        if handles not in self._segments:
            self._segments[handles] = _segments(handles)
        return self._segments[handles]

    def spans(self, rows: tuple[Row, ...], applications: tuple[int, ...]) -> tuple[Span, ...]:
        """The rows in which any of these applications acts, neighbours with the same identities together."""
        combinations = tuple(tuple((n, row.handles[n]) for n in applications) for row in rows)
        if combinations not in self._spans:
            self._spans[combinations] = _spans(combinations)
        return self._spans[combinations]

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

    def project(
        self, device: torch.device, dtype: torch.dtype, gates: Mapping[Adapter, Any] | None = None
    ) -> None:
        """Project K and V of every identity of the run at every site, once per device and dtype.

        UniID's weights are only passed through the device, one site at a time, for all identities together. Gated layers
        (`gates`, by adapter) are where ComfyUI has loaded them, and only those with an open attention gate are asked.
        """
        if (device, dtype) in self._projected:
            return
        groups: dict[Any, list[Handle]] = {}
        for handle in self._handles.values():
            groups.setdefault((handle.adapter, handle.tokens.shape[1]), []).append(handle)
        projected: dict[Any, Any] = {}
        for (adapter, _), handles in groups.items():
            tokens = torch.cat([handle.tokens for handle in handles]).to(device)
            if adapter.gates:
                assert (
                    gates is not None
                )  # a call in which any identity of a plan acts brings the gated layers of all
                projected |= self._project_gates(handles, tokens.to(dtype), gates[adapter])
                continue
            for site in self.plan.sites:
                keys, values = (part.to(dtype) for part in adapter.layers.project(site.index, tokens))
                for row, handle in enumerate(handles):
                    projected[site.index, handle] = (keys[row : row + 1], values[row : row + 1])
        self._projected[device, dtype] = projected

    def _project_gates(self, handles: list[Handle], tokens: Tensor, gates: Any) -> dict[Any, GateIdentity]:
        """What identities (tokens (H, T, D), one for each handle) bring to each gated adapter with an open attention gate."""
        found: dict[Any, GateIdentity] = {}
        for site in self.plan.sites:
            if not handles[0].adapter.gates[site.index][0]:
                nothing = tokens.new_zeros(1, 0, 0)
                found |= {(site.index, handle): GateIdentity(nothing, nothing) for handle in handles}
                continue
            keys, values = gates[str(site.index)].project(tokens)
            for row, handle in enumerate(handles):
                own_keys, own_values = keys[row : row + 1], values[row : row + 1]
                bias = None if handle.bias is None else handle.bias[0]
                if bias is not None and tokens.device.type != "cpu":
                    own_keys, own_values, bias = repeat_copies(own_keys, own_values, bias)
                found[site.index, handle] = GateIdentity(
                    own_keys, own_values, None if bias is None else bias.to(tokens)
                )
        return found

    def keys_values(
        self, site: Site, handles: tuple[Handle, ...], heads: int, device: torch.device, dtype: torch.dtype
    ) -> PreparedIdentity:
        """K and V of a segment at a site, in the form that attention takes."""
        key = (site.index, handles, device, dtype)
        if key not in self._prepared:
            self.project(device, dtype)
            pairs = [self._projected[device, dtype][site.index, handle] for handle in handles]
            keys, values = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            self._prepared[key] = prepare_identity(keys, values, heads)
        return self._prepared[key]

    def gate_identity(
        self, site: Site, handle: Handle, device: torch.device, dtype: torch.dtype
    ) -> GateIdentity:
        """What one identity brings to a gated adapter, as `project` made it."""
        found: GateIdentity = self._projected[device, dtype][site.index, handle]
        return found

    def mask(
        self,
        application: int,
        rows: tuple[Row, ...],
        size: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The mask of an application for these rows at an attention resolution (h, w): (1 or rows, h * w, 1)."""
        mask = self.plan.applications[application].mask
        if mask is None:
            return None
        views = tuple((row.area, row.image % mask.shape[0]) for row in rows)
        if len(set(views)) == 1:
            views = views[:1]
        key = (application, views, size, self.current_size, device, dtype)
        if key not in self._masks:
            self._masks[key] = torch.stack([self._view(mask, *view, size) for view in views]).to(
                device, dtype
            )
        return self._masks[key]

    def _view(self, mask: Tensor, area: tuple[int, ...] | None, image: int, size: tuple[int, int]) -> Tensor:
        view = mask[image][None, None]
        if area is not None:
            height, width, y, x = area
            view = F.interpolate(view, self.current_size, mode="area")
            view = view[..., y : y + height, x : x + width]
        # The share of a token's area that the mask covers: a hard edge leaks nothing into the token beside it.
        view = F.interpolate(view, size, mode="area")
        return view.flatten()[:, None]


def tokens_size(extra: Mapping[str, Any], count: int, latent_size: Sequence[int]) -> tuple[int, int]:
    """(h, w) of the image tokens in a block, from its options or, where another node's block names none, from their count.

    Raises:
        InputError: no halving of the latent has so many tokens.
    """
    if (shape := extra.get("activations_shape")) is not None:
        return int(shape[-2]), int(shape[-1])
    height, width = latent_size
    while True:
        if height * width == count:
            return height, width
        if height * width < count or height * width == 1:
            raise InputError(
                f"attn_mask cannot be laid on {count} image tokens: another node's block does not name their height and width, and "
                f"no halving of a latent of {latent_size[0]} x {latent_size[1]} has as many. Sample without that node, or without the mask."
            )
        height, width = -(-height // 2), -(-width // 2)


def _segments(handles: tuple[Handle | None, ...]) -> tuple[Segment, ...]:
    runs: list[Segment] = []
    for position, handle in enumerate(handles):
        if handle is None:
            continue
        last = runs[-1] if runs else None
        if last is not None and last.stop == position and last.handles == (handle,):
            runs[-1] = Segment(last.start, position + 1, last.handles)
        else:
            runs.append(Segment(position, position + 1, (handle,)))
    merged: list[Segment] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last is not None and last.stop == run.start and _can_join(last, run):
            merged[-1] = Segment(last.start, run.stop, last.handles + run.handles)
        else:
            merged.append(run)
    return tuple(merged)


def _spans(combinations: tuple[tuple[tuple[int, Handle | None], ...], ...]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for position, combination in enumerate(combinations):
        handles = tuple((number, handle) for number, handle in combination if handle is not None)
        last = spans[-1] if spans else None
        if not handles:
            continue
        if last is not None and last.stop == position and last.handles == handles:
            spans[-1] = Span(last.start, position + 1, handles)
        else:
            spans.append(Span(position, position + 1, handles))
    return tuple(spans)


def _can_join(left: Segment, right: Segment) -> bool:
    rows_each = (left.stop - left.start) // len(left.handles)
    same_count = left.handles[0].tokens.shape[1] == right.handles[0].tokens.shape[1]
    return same_count and rows_each == right.stop - right.start


def tile_rows(rows: tuple[Row, ...], count: int) -> tuple[Row, ...]:
    """The rows of a model call whose batch another node has repeated as a whole, as tiled sampling does.

    Raises:
        InputError: the batch is no repetition of the rows.
    """
    if count % len(rows):
        raise InputError(
            f"another node changed the batch of this model call from {len(rows)} rows to {count}, and it cannot be told which of "
            "them carry the identity. Remove the node that splits or regroups the batch, or apply the ID adapter without it."
        )
    return rows * (count // len(rows))


def expand_rows(rows: tuple[Row, ...], extra: dict[str, Any], count: int) -> tuple[Row, ...]:
    """The rows behind `count` attention rows, where another pack (Attention Couple) has multiplied conditionings.

    Such packs repeat each positive chunk once per prompt between attn2_patch and attn2_output_patch. They may name the
    conditioning of each resulting chunk in `cond_or_uncond_couple`.

    Raises:
        InputError: the rows cannot be explained.
    """
    if count == len(rows):
        return rows
    kinds: list[int] = list(extra.get("cond_or_uncond", []))
    per_chunk = len(rows) // max(len(kinds), 1)
    chunks = [rows[i * per_chunk : (i + 1) * per_chunk] for i in range(len(kinds))]
    expanded: list[Row] = []
    if (couple := extra.get("cond_or_uncond_couple")) is not None:
        for kind in couple:
            of_kind = [chunk for chunk, own in zip(chunks, kinds, strict=True) if own == kind]
            if len(set(of_kind)) == 1:  # several different ones would leave it open which is meant
                expanded += of_kind[0]
    else:
        negatives = sum(kind == 1 for kind in kinds)
        repeats = (count // max(per_chunk, 1) - negatives) // max(len(kinds) - negatives, 1)
        for chunk, kind in zip(chunks, kinds, strict=True):
            expanded += chunk * (1 if kind == 1 else repeats)
    if len(expanded) != count:
        raise InputError(
            f"another node patch turned {len(rows)} rows of this model call into {count}, and it cannot be told which of them "
            "carry the identity. Remove the node that multiplies the conditioning, or apply the ID adapter without it."
        )
    return tuple(expanded)
