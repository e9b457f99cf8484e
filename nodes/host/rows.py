"""The latent rows of a model call, and the identity of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import comfy.conds
from torch import Tensor

from ...idadapter_core import Adapter
from ...idadapter_core.errors import InputError

R = TypeVar("R")  # the sampling run that rows belong to


@dataclass(frozen=True, eq=False)
class Handle:
    """Host-side tokens of one identity in one role. Hashed by object id, so it can key caches without comparing tensors."""

    adapter: Adapter
    tokens: Tensor  # (1, T, D)
    bias: Tensor | None = None  # (1, T), see `Identity.adapter_bias`


@dataclass(frozen=True)
class Row:
    """One latent row of a model call."""

    handles: tuple[Handle | None, ...]  # one per application of the plan
    area: (
        tuple[int, ...] | None
    )  # height, width, y, x in the latent; None if the conditioning covers all of it
    image: int  # index of the latent in the batch


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows for one attention call, with the same number of rows for each handle."""

    start: int
    stop: int
    handles: tuple[Handle, ...]


@dataclass(frozen=True)
class Span:
    """Neighbouring rows with the same identities, given as (application number, handle) pairs."""

    start: int
    stop: int
    handles: tuple[tuple[int, Handle], ...]


@dataclass(frozen=True, eq=False)
class Rows(Generic[R]):
    """All rows of one model call, as passed to the model by `RowTags.concat`."""

    run: R
    rows: tuple[Row, ...]

    def to(self, *_: Any, **__: Any) -> Rows[R]:
        """Return self: ComfyUI moves conditioning values to the device of the call, but rows stay on the host."""
        return self


class RowTags(comfy.conds.CONDRegular, Generic[R]):
    """A conditioning value without a tensor that records the identity of each latent row.

    As part of the conditioning, the rows stay correct with every guider, area, mask and batch split.
    """

    def __init__(
        self,
        run: R,
        handles: tuple[Handle | None, ...],
        text_positions: tuple[int, ...],
        rows: tuple[Row, ...] = (),
    ):
        super().__init__(None)
        self.run = run
        self.handles = handles
        self.text_positions = text_positions
        self.rows = rows

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **_: Any) -> RowTags[R]:
        region = tuple(area) if area is not None else None
        rows = tuple(Row(self.handles, region, image) for image in range(batch_size))
        return RowTags(self.run, self.handles, self.text_positions, rows)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, RowTags) and other.run is self.run

    def concat(self, others: Sequence[RowTags[R]]) -> Rows[R]:
        return Rows(self.run, tuple(row for tags in (self, *others) for row in tags.rows))

    def size(self) -> list[int]:
        tokens = sum(handle.tokens.shape[1] for handle in self.handles if handle is not None)
        return [max(len(self.rows), 1), tokens, 1]


def segments(handles: tuple[Handle | None, ...]) -> tuple[Segment, ...]:
    """Group rows with these handles into as few attention calls as possible, skipping rows without an identity."""
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


def spans(combinations: tuple[tuple[tuple[int, Handle | None], ...], ...]) -> tuple[Span, ...]:
    """Group neighbouring rows with the same identities; rows in which none of these applications acts are skipped."""
    found: list[Span] = []
    for position, combination in enumerate(combinations):
        handles = tuple((number, handle) for number, handle in combination if handle is not None)
        last = found[-1] if found else None
        if not handles:
            continue
        if last is not None and last.stop == position and last.handles == handles:
            found[-1] = Span(last.start, position + 1, handles)
        else:
            found.append(Span(position, position + 1, handles))
    return tuple(found)


def _can_join(left: Segment, right: Segment) -> bool:
    rows_each = (left.stop - left.start) // len(left.handles)
    same_count = left.handles[0].tokens.shape[1] == right.handles[0].tokens.shape[1]
    return same_count and rows_each == right.stop - right.start


def tile_rows(rows: tuple[Row, ...], count: int) -> tuple[Row, ...]:
    """Repeat the rows of a model call for a batch that another node repeated as a whole, as tiled sampling does.

    Raises:
        InputError: `count` is not a multiple of the number of rows.
    """
    if count % len(rows):
        raise InputError(
            f"another node changed the batch of this model call from {len(rows)} rows to {count}, and it cannot be told which of "
            "them carry the identity. Remove the node that splits or regroups the batch, or apply the ID adapter without it."
        )
    return rows * (count // len(rows))


def expand_rows(rows: tuple[Row, ...], extra: dict[str, Any], count: int) -> tuple[Row, ...]:
    """Return the row of each of `count` attention rows if another pack (Attention Couple) has multiplied conditionings.

    Such packs repeat each positive chunk once per prompt between attn2_patch and attn2_output_patch. They may list the
    conditioning of each resulting chunk in `cond_or_uncond_couple`.

    Raises:
        InputError: the attention rows cannot be matched to rows.
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
            if len(set(of_kind)) == 1:  # several different ones would be ambiguous
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


def window_of(options: dict[str, Any]) -> list[int] | None:
    """Return the batch indices of the latents in a context window (AnimateDiff's or ComfyUI's own), or None without a window."""
    indices = (options.get("ad_params") or {}).get("sub_idxs")
    if indices is None and getattr(window := options.get("context_window"), "dim", None) == 0:
        # Index of an extra latent placed before the window.
        anchor = getattr(window, "causal_anchor_index", None)
        first = [] if anchor is None or anchor < 0 else [anchor]
        indices = [*first, *getattr(window, "index_list", ())]
    return None if indices is None else [int(index) for index in indices]


def numbered(rows: tuple[Row, ...], window: list[int]) -> tuple[Row, ...]:
    """Return the rows with `image` changed from an index in the window to one in the whole batch."""
    return tuple(replace(row, image=window[row.image]) if row.image < len(window) else row for row in rows)
