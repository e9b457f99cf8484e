"""Nodes that load an adapter, apply it to a model and rescale it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..idadapter_core import Adapter, Identity, load_adapter
from ..idadapter_core.errors import InputError
from ..idadapter_core.schedule import RescaleSchedule
from .host import choices, model as host, paths
from .host.choices import AUTO, NONE
from .host.memory import Live, LoadedAdapter, manage, require_same_file
from .host.messages import Message, info, keeps_report, node_id_of, report_ui, warning
from .host.off import is_off
from .host.plan import Application, Rescale, RescaleMode
from .host.titles import APPLY, LOAD_ADAPTER, RESCALE
from .sockets import CATEGORY, AdapterSocket, IdentitySocket, auto_options, file_options

log = logging.getLogger(__name__)
RESCALE_MODES: tuple[RescaleMode, ...] = ("normalized", "limit", "off")
_live: Live[LoadedAdapter] = Live()
SCOPES = ("ID adapters", "every attention patch")


def load(path: Path, text_branch: Path | None) -> LoadedAdapter:
    """Load an adapter and put its encoder under ComfyUI's management."""
    progress = comfy.utils.ProgressBar(100)

    def step(share: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(round(100 * share))

    adapter = load_adapter(path, text_branch, step, comfy.ops.manual_cast)
    encoder = manage(adapter.encoder, _reload_encoder, path, text_branch, adapter.digest)
    gates: Any = adapter.mechanisms.gated
    if gates is None:
        return LoadedAdapter(adapter, encoder)
    gates.adapter_digest = adapter.digest  # identifies copies for other devices
    return LoadedAdapter(adapter, encoder, manage(gates, _reload_gates, path, adapter.digest))


def load_files(adapter: str, text_branch: str | None, *, hand_over: bool = False) -> LoadedAdapter:
    """Load an adapter by the names of its files, or return it if something still uses it (see `Live`)."""
    path = paths.path_of(paths.ADAPTERS, adapter)
    second = None if text_branch is None else paths.path_of(paths.ADAPTERS, text_branch)
    return _live.get(paths.stamp(path, second), lambda: load(path, second), hand_over=hand_over)


def _reload_encoder(path: Path, text_branch: Path | None, digest: str) -> object:
    return _load_again(path, text_branch, digest).patcher


def _reload_gates(path: Path, digest: str) -> object:
    return _load_again(path, None, digest).gates


def _load_again(path: Path, text_branch: Path | None, digest: str) -> LoadedAdapter:
    loaded = load(path, text_branch)
    require_same_file(path, digest, loaded.adapter.digest)
    return loaded


class LoadIDAdapter(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterLoadAdapter",
            display_name=LOAD_ADAPTER,
            category=CATEGORY,
            description=(
                "Loads the trained weights of an identity adapter, UniID or IDAdapter. What a file is, is read from its contents: "
                "names do not matter."
            ),
            search_aliases=["uniid", "face adapter", "ipadapter model loader"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=auto_options(file_options(paths.ADAPTERS)),
                    tooltip="A file of models/idadapter. For the published UniID, the adapter branch's pytorch_model.bin. auto: the only one.",
                ),
                io.Combo.Input(
                    "text_branch",
                    options=[AUTO, NONE, *paths.files(paths.ADAPTERS)],
                    default=AUTO,
                    tooltip="A second file with the text branch: UniID publishes its two branches apart. auto: the one in the folder "
                    "text_branch beside the adapter's adapter_branch. none where one file holds everything.",
                ),
            ],
            outputs=[
                AdapterSocket.Output(
                    "adapter", display_name="adapter", tooltip="For Mix Face Features and Apply ID Adapter."
                ),
                io.String.Output(
                    "info", display_name="info", tooltip="What the files hold and what to know about them."
                ),
            ],
        )

    @classmethod
    def execute(cls, adapter: str, text_branch: str) -> io.NodeOutput:
        first = choices.adapter_file(adapter)
        second = choices.text_branch(text_branch, first)
        loaded = load_files(first, second)
        return io.NodeOutput(loaded, loaded.adapter.info, ui=report_ui(_report(loaded.adapter), LOAD_ADAPTER))

    @classmethod
    def fingerprint_inputs(cls, adapter: str | None, text_branch: str | None, **_: Any) -> str:
        return " ".join(
            paths.stamp_of(paths.ADAPTERS, None if name == AUTO else name) for name in (adapter, text_branch)
        )


def _report(adapter: Adapter) -> list[Message]:
    """Describe the contents of the files; notes become warnings."""
    facts = [line for line in adapter.info.splitlines() if not line.startswith("Note: ")]
    return [*map(info, facts), *(warning(f"{adapter.name}: {note}") for note in adapter.notes)]


def _apply_inputs() -> list[io.Input]:
    """Inputs of Apply ID Adapter."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model the adapter was made for, for example SDXL for the published UniID.",
        ),
        AdapterSocket.Input("adapter", tooltip="From Load ID Adapter."),
        IdentitySocket.Input("identity", tooltip="From Mix Face Features or Load Identity."),
        io.Float.Input(
            "weight",
            default=1.0,
            min=-1.0,
            max=3.0,
            step=0.05,
            tooltip="Strength of the identity. 0 is exactly the plain model. With Normalized Identity Rescaling it "
            "multiplies the adapter scales. IDAdapter: its changed K/V weights follow it too.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where in the sampling the identity begins to act.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where it stops. A later window that starts here takes over without an overlap.",
        ),
        io.Mask.Input(
            "attn_mask",
            optional=True,
            tooltip="Where in the picture the identity acts (white). Any size; a batch of masks goes with the batch of latents. "
            "IDAdapter's changed K/V weights have no place or time and stay outside masks and percents.",
        ),
    ]


class ApplyIDAdapter(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterApply",
            display_name=APPLY,
            category=CATEGORY,
            description=(
                "Makes a model draw this person. For several people use one node each, with masks. The positive prompts get "
                "the identity, the negative ones its unconditional counterpart (UniID) or no adapter at all (IDAdapter)."
            ),
            search_aliases=["apply uniid", "faceid", "identity", "ipadapter face"],
            inputs=_apply_inputs(),
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="For the sampler, or the next node that changes the model.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        adapter: LoadedAdapter,
        identity: Identity | None,
        weight: float,
        start_percent: float,
        end_percent: float,
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        if identity is None or is_off(cls.hidden):
            return io.NodeOutput(model)
        if start_percent > end_percent:
            raise InputError(
                f"start_percent ({start_percent}) lies after end_percent ({end_percent}); exchange them. Equal values switch the "
                "identity off."
            )
        mask = None if attn_mask is None else check_mask(attn_mask)
        patched, application = host.apply(
            model, adapter, identity, weight, start_percent, end_percent, mask, node_id_of(cls)
        )
        return io.NodeOutput(patched, ui=report_ui(_warnings(application), APPLY))


def _warnings(application: Application) -> list[Message]:
    """Return the warnings about an application that the node can give before sampling."""
    texts = list(application.adapter.notes)
    if application.weight == 0:
        texts.append("weight is 0, so this identity does not act")
    if application.start_percent == application.end_percent:
        texts.append("start_percent equals end_percent, so this identity does not act")
    if application.mask is not None and not application.mask.any():
        texts.append("attn_mask is black everywhere, so this identity does not act")
    return [warning(text) for text in texts]


def check_mask(mask: Tensor) -> Tensor:
    """Return a MASK as (B, H, W) in 0..1.

    Raises:
        InputError: wrong shape, or values that are not finite.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise InputError(f"attn_mask must be a MASK of shape (batch, height, width), got {tuple(mask.shape)}")
    if not mask.isfinite().all():
        raise InputError("attn_mask has values that are not finite numbers; check the node that made it")
    return mask.float().clamp(0, 1).cpu()


def _rescale_inputs() -> list[io.Input]:
    """Inputs of Normalized Identity Rescaling."""
    defaults = RescaleSchedule()

    def scale(name: str, value: float, tooltip: str) -> io.Float.Input:
        return io.Float.Input(name, default=value, min=-1.0, max=5.0, step=0.05, tooltip=tooltip)

    return [
        io.Model.Input("model", tooltip="Before or after Apply ID Adapter: the order does not matter."),
        io.Combo.Input(
            "mode",
            options=list(RESCALE_MODES),
            default="normalized",
            tooltip="normalized: what is added gets exactly the scale's length, so weights and fades inside other packs' nodes no "
            "longer matter. limit: it gets at most that length and keeps its own below, so they do matter; the better choice "
            "for `every attention patch`. off: everything acts as trained times its weight, text tokens at scale 1.",
        ),
        scale(
            "adapter_early",
            defaults.adapter_early,
            "Adapter part in the early steps, as a multiple of the text's.",
        ),
        scale("adapter_late", defaults.adapter_late, "Adapter part in the later steps."),
        scale(
            "text_early",
            defaults.text_early,
            "Identity text tokens in the early steps, as a multiple of a well-known name's length.",
        ),
        scale("text_late", defaults.text_late, "Identity text tokens in the later steps."),
        io.Float.Input(
            "early_fraction",
            default=defaults.early_fraction,
            min=0.0,
            max=1.0,
            step=0.0001,
            tooltip="Share of this sampler's steps that count as early: 0.1667 is 5 of 30.",
        ),
        io.Combo.Input(
            "scope",
            options=list(SCOPES),
            default=SCOPES[0],
            tooltip="every attention patch: what IPAdapter, InstantID or PuLID add in the model's cross-attention is "
            "rescaled, too, inside their masks. Mode limit keeps their weight dials working. What changes the text's attention "
            "itself (PLADIS, NAG) is left alone.",
        ),
        io.Boolean.Input(
            "gated",
            default=False,
            optional=True,
            tooltip="IDAdapter only, an extension of ours: what its gated layers add is set to a multiple of the length of the "
            "layer's self-attention. Off: they act as trained, times the weight.",
        ),
    ]


class NormalizedRescaling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterRescale",
            display_name=RESCALE,
            category=CATEGORY,
            description=(
                "Balances identity against the prompt by the lengths of both (UniID): in each layer the adapter's part is set to "
                "a multiple of the text's. Low early scales let the prompt lay out the picture, higher late ones bring the person. "
                "IDAdapter does not need it; see `gated`."
            ),
            search_aliases=["uniid rescale", "prompt control", "identity strength schedule"],
            inputs=_rescale_inputs(),
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="For the sampler, or the next node that changes the model.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        mode: str,
        adapter_early: float,
        adapter_late: float,
        text_early: float,
        text_late: float,
        early_fraction: float,
        scope: str,
        gated: bool = False,
    ) -> io.NodeOutput:
        if is_off(cls.hidden):
            return io.NodeOutput(model)
        schedule = RescaleSchedule(adapter_early, adapter_late, text_early, text_late, early_fraction)
        chosen = next((known for known in RESCALE_MODES if known == mode), None)
        if chosen is None or scope not in SCOPES:
            raise InputError(
                f"{RESCALE} knows the modes {', '.join(RESCALE_MODES)} and the scopes {', '.join(SCOPES)}, got {mode!r} and {scope!r}. "
                "Choose from the lists."
            )
        rescale = Rescale(schedule, scope == SCOPES[1], gated, chosen, node_id_of(cls))
        return io.NodeOutput(host.rescaled(model, rescale))
