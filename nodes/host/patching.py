"""How a plan acts while ComfyUI samples.

Three wrappers on the MODEL, all without state of their own:
- OUTER_SAMPLE starts a `Run` and tags the run's own copies of the conditionings, by role name;
- CALC_COND_BATCH gives the identity's text tokens the scale of the step;
- APPLY_MODEL decides what acts in this call and binds one attention replacement per site (UniID) or one middle patch (the
  gated adapters of IDAdapter), over whatever other packs have installed by then: so the order of the nodes does not matter,
  and no slot is ever taken from another pack.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import comfy.conds
import torch
from comfy.ldm.modules import attention as comfy_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...idadapter_core.attention import add_identity, add_residual, sample_norm
from ...idadapter_core.errors import InputError
from ...idadapter_core.sites import Site
from .call import CALL, Acting, Call
from .compilation import has_compile_wrapper, uncompiled
from .gates import GatePatch, loaded_gates, remember_norm
from .plan import KEY, Application, Plan
from .run import Handle, Row, Rows, RowTags, Run, expand_rows, tile_rows

log = logging.getLogger(__name__)

# Share of the text's norm below which another pack's residual counts as rounding and is not rescaled.
FOREIGN_FLOOR = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}
ATTACHED = f"{KEY}_attached"  # in a conditioning: identities of its own, as (Identity, role) pairs
TEXT_POSITIONS = f"{KEY}_text"  # in a conditioning: the neighbouring positions of its identity text tokens


def install(model: Any) -> None:
    """Register the wrappers on a MODEL that carries a plan, once."""
    wrappers = {
        WrappersMP.OUTER_SAMPLE: outer_sample,
        WrappersMP.CALC_COND_BATCH: calc_cond_batch,
        WrappersMP.APPLY_MODEL: apply_model,
    }
    for kind, wrapper in wrappers.items():
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


def outer_sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Start a run: tag the conditionings of this run, and free its caches when it ends, however it ends."""
    guider = executor.class_obj
    plan: Plan = guider.model_options["transformer_options"][KEY]
    height, width = noise.shape[-2:]
    run = Run(plan, tuple(sigmas.tolist()), (height, width), noise.shape[0])
    _warn_of_idle_rescaling(plan)
    for role, conditionings in guider.conds.items():
        for conditioning in conditionings:
            _tag(run, role, conditioning)
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        run.clear()


def _warn_of_idle_rescaling(plan: Plan) -> None:
    rescale = plan.rescale
    if rescale is None or rescale.gated or rescale.every_patch or not plan.applications:
        return
    if all(application.gated for application in plan.applications):
        log.warning(
            "Normalized Identity Rescaling has nothing to rescale: every adapter on this model is an IDAdapter. Switch `gated` on "
            "to rescale its gated layers, or remove the node."
        )


def _tag(run: Run, role: str, conditioning: dict[str, Any]) -> None:
    negative = "negative" in role
    attached = conditioning.get(ATTACHED)
    if attached is None:
        handles = tuple(run.handle(a, a.identity, negative) for a in run.plan.applications)
    else:
        if any((kind == "negative") != negative for _, kind in attached):
            log.warning(
                "a conditioning with an identity attached as %s is used as %s; attach it in the role it is used in",
                "positive" if negative else "negative",
                role,
            )
        handles = _attached_handles(run, attached)
    tags = RowTags(run, handles, tuple(conditioning.get(TEXT_POSITIONS, ())))
    conditioning["model_conds"] = {**conditioning.get("model_conds", {}), KEY: tags}


def _attached_handles(run: Run, attached: tuple[Any, ...]) -> tuple[Handle | None, ...]:
    """Each attached identity takes the place of the next application of its adapter; the others stay silent."""
    handles: list[Handle | None] = [None] * len(run.plan.applications)
    free = list(enumerate(run.plan.applications))
    for identity, role in attached:
        match = next((item for item in free if item[1].adapter.digest == identity.adapter), None)
        if match is None:
            names = ", ".join(sorted({a.adapter.name for a in run.plan.applications})) or "none"
            raise InputError(
                "a conditioning has an identity attached for which no Apply ID Adapter is left on this model "
                f"(adapters applied: {names}). Add one Apply ID Adapter, with the identity's own adapter, for each identity "
                "attached to one conditioning."
            )
        free.remove(match)
        number, application = match
        handles[number] = run.handle(application, identity, role == "negative")
    return tuple(handles)


def calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x_in: Tensor, timestep: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Scale the identity's text tokens for this step. ControlNets, which run later, see the scaled tokens too."""
    tagged = [_tags(c) for group in conds for c in group or ()]
    runs = [tags.run for tags in tagged if tags is not None and tags.text_positions]
    rescale = runs[0].plan.rescale if runs else None
    if rescale is None:
        return executor(model, conds, x_in, timestep, *args, **kwargs)
    run = runs[0]
    scale = rescale.schedule.text_scale(run.step(float(timestep.max())), run.steps)

    def scaled(conditioning: dict[str, Any]) -> dict[str, Any]:
        positions = _text_positions(conditioning)
        if not positions or scale == 1:
            return conditioning
        states = conditioning["model_conds"]["c_crossattn"].cond.clone()
        states[:, positions[0] : positions[-1] + 1] *= scale
        model_conds = {**conditioning["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(states)}
        return {**conditioning, "model_conds": model_conds}

    conds = [None if group is None else [scaled(c) for c in group] for group in conds]
    return executor(model, conds, x_in, timestep, *args, **kwargs)


def _tags(conditioning: dict[str, Any]) -> RowTags | None:
    tags = conditioning["model_conds"].get(KEY)
    return tags if isinstance(tags, RowTags) else None


def _text_positions(conditioning: dict[str, Any]) -> tuple[int, ...]:
    # From the tags, not from the conditioning itself: ComfyUI copies a positive's own keys onto the negative it makes up for
    # an area, but its model_conds always come from a negative.
    tags = _tags(conditioning)
    return () if tags is None else tags.text_positions


def apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Bind the attention replacements of this call, or leave it untouched when nothing acts."""
    options = transformer_options or {}
    rows = kwargs.pop(KEY, None)
    if not isinstance(rows, Rows):
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    run, model = rows.run, executor.class_obj
    replacements = options.get("patches_replace", {}).get("attn2", {})
    call = _call(rows, bool(replacements), model, x, options)
    if call is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if call.acting or call.gated:
        run.project(x.device, model.get_dtype_inference(), call.gates)
    options = {**options, CALL: call}
    if call.acting or call.foreign_scale is not None:
        bound = dict(replacements)
        for site in run.plan.sites:
            previous = replacements.get(site.comfy, replacements.get(site.comfy[:2]))
            if call.acting or previous is not None:
                bound[site.comfy] = _chain(run, site, previous)
        options["patches_replace"] = {**options.get("patches_replace", {}), "attn2": bound}
    if call.gated:
        patches = dict(options.get("patches", {}))
        patches["middle_patch"] = [*patches.get("middle_patch", ()), _gate_patch(run)]
        if call.gates_normalized:
            patches["attn1_output_patch"] = [*patches.get("attn1_output_patch", ()), remember_norm]
        options["patches"] = patches
    compiled = has_compile_wrapper(options) or run.has_compiled_modules(model.diffusion_model)
    with uncompiled() if compiled else nullcontext():
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _call(rows: Rows, foreign: bool, model: Any, x: Tensor, options: dict[str, Any]) -> Call | None:
    run, plan = rows.run, rows.run.plan
    rescale = plan.rescale
    present = [
        n for n in range(len(plan.applications)) if any(row.handles[n] is not None for row in rows.rows)
    ]
    foreign = foreign and rescale is not None and rescale.every_patch
    if not present and not foreign:
        return None
    # The noise level decides what acts: the host waits for it here, once per model call, and in no layer.
    sigma = float(options["sigmas"].max()) if "sigmas" in options else 0.0
    scale = 1.0 if rescale is None else rescale.schedule.adapter_scale(run.step(sigma), run.steps)
    gates_normalized = rescale is not None and rescale.gated
    acting: list[Acting] = []
    gated: list[Acting] = []
    for number in present:
        application = plan.applications[number]
        strength = application.weight * (1.0 if application.gated and not gates_normalized else scale)
        if strength != 0 and run.in_window(number, model.model_sampling, sigma):
            kind = gated if application.gated else acting
            on_device = torch.full((), strength, device=x.device)
            kind.append(Acting(number, strength, on_device, application.mask is not None))
    if not acting and not gated and not foreign:
        return None
    tiled = tile_rows(rows.rows, x.shape[0])
    for masked in (a for a in (*acting, *gated) if a.masked):
        _require_whole_pictures(run, rows.rows, x, plan.applications[masked.number])
    return Call(
        run=run,
        rows=tiled,
        acting=tuple(acting),
        gated=tuple(gated),
        normalized=rescale is not None,
        gates_normalized=gates_normalized,
        foreign_scale=torch.full((), scale, device=x.device) if foreign else None,
        gates=loaded_gates(model, plan),
        owns_stream=not options.get("patches", {}).get("middle_patch"),
    )


def _require_whole_pictures(run: Run, rows: tuple[Row, ...], x: Tensor, application: Application) -> None:
    """Raise InputError where a mask cannot be laid on the rows: the call holds tiles or other latents than the run's."""
    size = tuple(x.shape[-2:])
    whole = len(rows) == x.shape[0] and all(size == (row.area or run.latent_size)[:2] for row in rows)
    mask = application.mask
    if mask is not None and mask.shape[0] > 1:
        whole = whole and max(row.image for row in rows) + 1 == run.latents
    if not whole:
        raise InputError(
            "attn_mask cannot follow the tiles or windows that another node cuts this model call into; sample without them, or "
            "without the mask."
        )


def _gate_patch(run: Run) -> GatePatch:
    # The same object in every step, so that a compiled graph stays valid.
    if run.gate_patch is None:
        run.gate_patch = GatePatch(run.plan.sites)
    patch: GatePatch = run.gate_patch
    return patch


Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def _chain(run: Run, site: Site, previous: Replacement | None) -> SiteAttention:
    # The same object in every step, so that a compiled graph stays valid. The run keeps `previous` alive with it.
    key = (site, id(previous))
    if key not in run.chains:
        run.chains[key] = SiteAttention(site, previous)
    chain: SiteAttention = run.chains[key]
    return chain


class SiteAttention:
    """The attn2 replacement of one site: text attention (or another pack's), plus what the acting identities add."""

    def __init__(self, site: Site, previous: Replacement | None):
        self.site = site
        self.previous = previous

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        call: Call = extra[CALL]
        out, reference, ours = self._base(call, q, k, v, extra)
        if not call.acting:
            return out
        norm = sample_norm(reference) if call.normalized else None
        rows = expand_rows(call.rows, extra, q.shape[0])
        for acting in call.acting:
            for segment in call.run.segments(rows, acting.number):
                span = slice(segment.start, segment.stop)
                identity = call.run.keys_values(
                    self.site, segment.handles, extra["n_heads"], q.device, q.dtype
                )
                mask = None
                if acting.masked:
                    size = tuple(extra["activations_shape"][-2:])
                    mask = call.run.mask(acting.number, rows[span], size, q.device, q.dtype)
                if not ours:  # another owner may still hold this tensor
                    out, ours = out.clone(memory_format=torch.contiguous_format), True
                base_norm = None if norm is None else norm[span]
                add_identity(
                    out[span], q[span], identity, acting.scale, base_norm=base_norm, mask=mask, inplace=True
                )
        return out

    def _base(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]
    ) -> tuple[Tensor, Tensor, bool]:
        """The output to add to, the tensor whose norm counts as the text's, and whether the output is ours to overwrite."""

        def text_attention() -> Tensor:
            out: Tensor = comfy_attention.optimized_attention(
                q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"], transformer_options=extra
            )
            return out

        if self.previous is None:
            out = text_attention()
            overridden = "optimized_attention_override" in extra
            return out, out, not overridden and not out.requires_grad
        out = self.previous(q, k, v, extra)
        if call.foreign_scale is None:
            return out, out, False
        text = text_attention()
        residual = out - text
        norm, added = sample_norm(text), sample_norm(residual)
        # What is not there stays away: two ways of computing the same attention differ by their rounding.
        factor = torch.where(
            added > FOREIGN_FLOOR.get(q.dtype, 0.0) * norm, call.foreign_scale * norm / added, 1.0
        )
        rescaled = add_residual(text, residual, factor.to(text.dtype)[:, None, None])
        return rescaled, text, not rescaled.requires_grad
