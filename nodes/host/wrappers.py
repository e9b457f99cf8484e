"""Wrappers that apply a plan while ComfyUI samples: which rows (positive, negative) get which identity, and what acts in a model call.

Three stateless wrappers on the MODEL:
- OUTER_SAMPLE starts a `Run` and tags the run's own copies of the conditionings, by role name;
- CALC_COND_BATCH multiplies the identity's text tokens by the scale of the step;
- APPLY_MODEL selects the applications that act in the call and binds one attention replacement per site (`decoupled`) or one
  middle patch (`gated`). They wrap the patches that other packs have installed by then, so the order of the nodes does not matter
  and no other pack loses a slot.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...idadapter_core.errors import InputError
from .call import CALL, ActiveApplication, Call, calling
from .compilation import has_compile_wrapper, uncompiled
from .conditioning import TEXT_POSITIONS, Attached, attached_to, is_negative
from .decoupled import Decoupled
from .findings import RunRecord, after_sampling, before_sampling, run_lost
from .foreign import ForeignSlots, Scale
from .gated import Gated, loaded_gates, remember_norm
from .masks import require_whole_pictures
from .plan import KEY, Application, Plan, Rescale
from .rows import Handle, Rows, RowTags, numbered, tile_rows, window_of
from .run import Run
from .text import scaled_states, tags_of
from .titles import APPLY, RESCALE

log = logging.getLogger(__name__)

_running: Counter[Plan] = Counter()  # plans of the runs in progress
# Noise levels of runs that were already reported as lost, by id.
_lost: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def outer_sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Start a run: tag its conditionings, sample, and always free its caches at the end."""
    guider = executor.class_obj
    plan: Plan | None = guider.model_options.get("transformer_options", {}).get(KEY)
    if plan is None:
        log.warning("another node took the identity's plan from this model, so no identity acts")
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    height, width = noise.shape[-2:]
    run = Run(plan, tuple(sigmas.tolist()), (height, width), noise.shape[0])
    before_sampling(plan, guider.conds, noise.shape[0]).show("run")
    for role, conditionings in guider.conds.items():
        for conditioning in conditionings:
            _tag(run, role, conditioning)
    _running[plan] += 1
    try:
        result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        run.of(ForeignSlots).read_trials()
        slots, placed = run.of(ForeignSlots), run.of(Gated).placed
        record = RunRecord(run.calls, run.evaluations, run.missed, placed, slots.owners_not_rescaled())
        if run.steps > 0:
            after_sampling(plan, record, guider.model_options).show("result")
        return result
    finally:
        _running[plan] -= 1
        if not _running[plan]:
            del _running[plan]
        run.clear()


def _report_lost_run(options: dict[str, Any]) -> None:
    """Report, once per sampling, a model call whose plan has no run because `outer_sample` was removed."""
    plan, sigmas = options.get(KEY), options.get("sample_sigmas")
    if not isinstance(plan, Plan) or plan in _running or not any(a.acts for a in plan.applications):
        return
    if not isinstance(sigmas, Tensor) or _lost.get(id(sigmas)) is sigmas:
        return
    _lost[id(sigmas)] = sigmas
    run_lost(plan).show("result")


def _tag(run: Run, role: str, conditioning: dict[str, Any]) -> None:
    negative = is_negative(role)
    attached = attached_to(conditioning)
    if attached:
        handles = _attached_handles(run, attached)
    else:
        handles = tuple(run.handle(a, a.identity, negative) for a in run.plan.applications)
    tags = RowTags(run, handles, tuple(conditioning.get(TEXT_POSITIONS, ())))
    conditioning["model_conds"] = {**conditioning.get("model_conds", {}), KEY: tags}


def _attached_handles(run: Run, attached: tuple[Attached, ...]) -> tuple[Handle | None, ...]:
    """Assign each attached identity to the next application of its adapter. Applications left over are inactive (None)."""
    handles: list[Handle | None] = [None] * len(run.plan.applications)
    free = list(enumerate(run.plan.applications))
    for one in attached:
        match = next((item for item in free if item[1].adapter.digest == one.identity.adapter), None)
        if match is None:
            names = ", ".join(sorted({a.adapter.name for a in run.plan.applications})) or "none"
            raise InputError(
                "a conditioning has an identity attached for which no Apply ID Adapter is left on this model "
                f"(adapters applied: {names}). Add one Apply ID Adapter, with the identity's own adapter, for each identity "
                "attached to one conditioning."
            )
        free.remove(match)
        number, application = match
        handles[number] = run.handle(application, one.identity, one.negative)
    return tuple(handles)


def calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x_in: Tensor, timestep: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Scale the identity's text tokens for this step. ControlNets run later and therefore see the scaled tokens."""
    tagged = [tags for group in conds for c in group or () if (tags := tags_of(c)) is not None]
    for tags in tagged:
        tags.run.current_size = (x_in.shape[-2], x_in.shape[-1])
    if not tagged:
        _report_lost_run(
            (args[0] if args else kwargs.get("model_options", {})).get("transformer_options", {})
        )
        return executor(model, conds, x_in, timestep, *args, **kwargs)
    run = tagged[0].run
    run.evaluations += 1
    before = run.calls
    result = executor(model, scaled_states(conds, run, timestep), x_in, timestep, *args, **kwargs)
    run.missed += run.calls == before
    return result


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
    """Bind the patches of this call, or leave it untouched if nothing acts."""
    options = dict(transformer_options or {})
    rows = kwargs.pop(KEY, None)
    if not isinstance(rows, Rows):
        _report_lost_run(options)
    # ComfyUI compiles without guards on the options: a graph that read the plan would also look for it in models without one.
    options.pop(KEY, None)
    if not isinstance(rows, Rows):
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    run, model = rows.run, executor.class_obj
    run.calls += 1
    run.of(ForeignSlots).read_trials()
    replacements = options.get("patches_replace", {}).get("attn2", {})
    try:
        call = _call(rows, bool(replacements), model, x, t, options)
    except InputError as error:
        raise _on_a_node(error, run.plan) from error
    if call is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    dtype = model.get_dtype_inference()
    if call.decoupled:
        run.of(Decoupled).project(x.device, dtype)
    if call.gated:
        run.of(Gated).project(x.device, dtype, call.gates)
    options = _bind(call, replacements, options)
    with ExitStack() as around:
        around.enter_context(calling(call))
        if has_compile_wrapper(options) or run.has_compiled_modules(model.diffusion_model):
            around.enter_context(uncompiled())
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        except InputError as error:
            raise _on_a_node(error, run.plan) from error


def _on_a_node(error: InputError, plan: Plan) -> InputError:
    """Prefix an error raised inside the model with the title of our node, because another node (the sampler) is running."""
    if str(error).startswith((APPLY, RESCALE)):
        return error
    title = next((application.title for application in plan.applications if application.acts), RESCALE)
    return InputError(f"{title}: {error}")


def _bind(call: Call, replacements: dict[Any, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the call's options with our patches, which wrap those of other packs."""
    run = call.run
    options = {**options, CALL: call}
    if call.decoupled or call.foreign_scale is not None:
        bound = dict(replacements)
        for site in run.plan.sites:
            previous = replacements.get(site.comfy, replacements.get(site.comfy[:2]))
            if call.decoupled or previous is not None:
                bound[site.comfy] = run.of(Decoupled).attention(site, previous)
        options["patches_replace"] = {**options.get("patches_replace", {}), "attn2": bound}
    if call.gated:
        patches = dict(options.get("patches", {}))
        patches["middle_patch"] = [*patches.get("middle_patch", ()), run.of(Gated).patch]
        if call.gates_normalized:
            patches["attn1_output_patch"] = [*patches.get("attn1_output_patch", ()), remember_norm]
        options["patches"] = patches
    return options


def _call(
    rows: Rows, foreign: bool, model: Any, x: Tensor, t: Tensor, options: dict[str, Any]
) -> Call | None:
    run, plan = rows.run, rows.run.plan
    rescale = plan.rescaling
    present = [
        n for n in range(len(plan.applications)) if any(row.handles[n] is not None for row in rows.rows)
    ]
    foreign = foreign and rescale is not None and rescale.every_patch
    if not present and not foreign:
        return None
    # The noise level selects the applications. The host waits for it here, once per model call and never inside a layer.
    sigma = float(options.get("sigmas", t).max())
    scale = 1.0 if rescale is None else rescale.schedule.adapter_scale(run.step(sigma), run.steps)
    decoupled: list[ActiveApplication] = []
    gated: list[ActiveApplication] = []
    for number in present:
        application = plan.applications[number]
        strength, at_most = _strength(application, rescale, scale)
        if strength != 0 and at_most != 0 and run.in_window(number, model.model_sampling, sigma):
            on_device = torch.full((), strength, device=x.device)
            active = ActiveApplication(number, strength, at_most, on_device, application.mask is not None)
            decoupled += [active] if application.is_decoupled else []
            gated += [active] if application.is_gated else []
    if not decoupled and not gated and not foreign:
        return None
    tiled = tile_rows(rows.rows, x.shape[0])
    if any(a.masked for a in (*decoupled, *gated)):
        window = window_of(options)
        if window is not None:
            tiled = numbered(tiled, window)
        for masked in (a for a in (*decoupled, *gated) if a.masked):
            require_whole_pictures(
                run, rows.rows, x, plan.applications[masked.number], windowed=window is not None
            )
    limits = rescale is not None and rescale.mode == "limit"
    return Call(
        run=run,
        rows=tiled,
        decoupled=tuple(decoupled),
        gated=tuple(gated),
        normalized=rescale is not None,
        gates_normalized=rescale is not None and rescale.gated,
        foreign_scale=Scale(torch.full((), scale, device=x.device), limits) if foreign else None,
        latent_size=(x.shape[-2], x.shape[-1]),
        gates=loaded_gates(model, plan),
        owns_stream=not options.get("patches", {}).get("middle_patch"),
    )


def _strength(application: Application, rescale: Rescale | None, scale: float) -> tuple[float, float | None]:
    """Return `strength` and `at_most` of an application in one step (see `ActiveApplication`)."""
    if rescale is None or (application.is_gated and not rescale.gated):
        return application.weight, None
    if rescale.mode == "limit":
        return scale, application.weight
    return application.weight * scale, None
