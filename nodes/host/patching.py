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
import weakref
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...idadapter_core.attention import add_identity, sample_norm
from ...idadapter_core.errors import InputError
from ...idadapter_core.sites import Site
from .call import CALL, Acting, Call, call_of, calling
from .compilation import has_compile_wrapper, uncompiled
from .conditioning import TEXT_POSITIONS, Attached, attached_to, is_negative
from .findings import Heard, after_sampling, before_sampling, run_lost
from .foreign import OVERRIDE, ForeignSlot, Replacement, Rescaled, Scale, text_attention
from .gates import GatePatch, loaded_gates, remember_norm
from .plan import KEY, Application, Plan, Rescale
from .run import Handle, Row, Rows, RowTags, Run, expand_rows, tile_rows, tokens_size
from .titles import APPLY, RESCALE

log = logging.getLogger(__name__)

_running: Counter[Plan] = Counter()  # plans whose runs were begun and have not ended
# Noise levels of runs that were told of, by id.
_lost: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


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
    plan: Plan | None = guider.model_options.get("transformer_options", {}).get(KEY)
    if plan is None:
        log.warning("another node took the identity's plan from this model, so no identity acts")
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    height, width = noise.shape[-2:]
    run = Run(plan, tuple(sigmas.tolist()), (height, width), noise.shape[0])
    before_sampling(plan, guider.conds, noise.shape[0]).say("run")
    for role, conditionings in guider.conds.items():
        for conditioning in conditionings:
            _tag(run, role, conditioning)
    _running[plan] += 1
    try:
        result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        run.settle_trials()
        changing = [slot.owner for slot in run.foreign.values() if slot.adds is False]
        heard = Heard(run.calls, run.evaluations, run.missed, run.placed, tuple(changing))
        if run.steps > 0:
            after_sampling(plan, heard, guider.model_options).say("result")
        return result
    finally:
        _running[plan] -= 1
        if not _running[plan]:
            del _running[plan]
        run.clear()


def _tell_of_lost_run(options: dict[str, Any]) -> None:
    """Say once per sampling that a model call of a plan came by without the run that `outer_sample` begins."""
    plan, sigmas = options.get(KEY), options.get("sample_sigmas")
    if not isinstance(plan, Plan) or plan in _running or not any(a.acts for a in plan.applications):
        return
    if not isinstance(sigmas, Tensor) or _lost.get(id(sigmas)) is sigmas:
        return
    _lost[id(sigmas)] = sigmas
    run_lost(plan).say("result")


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
    """Each attached identity takes the place of the next application of its adapter; the others stay silent."""
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
    """Scale the identity's text tokens for this step. ControlNets, which run later, see the scaled tokens too."""
    tagged = [tags for group in conds for c in group or () if (tags := _tags(c)) is not None]
    for tags in tagged:
        tags.run.current_size = (x_in.shape[-2], x_in.shape[-1])
    if not tagged:
        _tell_of_lost_run(
            (args[0] if args else kwargs.get("model_options", {})).get("transformer_options", {})
        )
        return executor(model, conds, x_in, timestep, *args, **kwargs)
    run = tagged[0].run
    run.evaluations += 1
    before = run.calls
    result = executor(model, _scaled(conds, run, timestep), x_in, timestep, *args, **kwargs)
    run.missed += run.calls == before
    return result


def _scaled(conds: list[Any], run: Run, timestep: Tensor) -> list[Any]:
    """The conditionings with the identity's text tokens at the scale of their step."""
    rescale = run.plan.rescaling
    if rescale is None or not any(_text_positions(c) for group in conds for c in group or ()):
        return conds
    scale = rescale.schedule.text_scale(run.step(float(timestep.max())), run.steps)

    def scaled(conditioning: dict[str, Any]) -> dict[str, Any]:
        positions = _text_positions(conditioning)
        text = conditioning.get("model_conds", {}).get("c_crossattn")
        if not positions or scale == 1 or text is None:
            return conditioning
        states = text.cond.clone()
        states[:, positions[0] : positions[-1] + 1] *= scale
        model_conds = {**conditioning["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(states)}
        return {**conditioning, "model_conds": model_conds}

    return [None if group is None else [scaled(c) for c in group] for group in conds]


def _tags(conditioning: dict[str, Any]) -> RowTags | None:
    tags = conditioning.get("model_conds", {}).get(KEY)
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
    options = dict(transformer_options or {})
    rows = kwargs.pop(KEY, None)
    if not isinstance(rows, Rows):
        _tell_of_lost_run(options)
    # ComfyUI compiles without guards on the options: a graph that has read the plan would look for it in models that have none.
    options.pop(KEY, None)
    if not isinstance(rows, Rows):
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    run, model = rows.run, executor.class_obj
    run.calls += 1
    run.settle_trials()
    replacements = options.get("patches_replace", {}).get("attn2", {})
    try:
        call = _call(rows, bool(replacements), model, x, t, options)
    except InputError as error:
        raise _on_a_node(error, run.plan) from error
    if call is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if call.acting or call.gated:
        run.project(x.device, model.get_dtype_inference(), call.gates)
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
    """A refusal from within the model, which no node of ours is the running one of, with the name of ours that it is about."""
    if str(error).startswith((APPLY, RESCALE)):
        return error
    title = next((application.title for application in plan.applications if application.acts), RESCALE)
    return InputError(f"{title}: {error}")


def _bind(call: Call, replacements: dict[Any, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A copy of the model call's options with our patches over what other packs have put there."""
    run = call.run
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
    # The noise level decides what acts: the host waits for it here, once per model call, and in no layer.
    sigma = float(options.get("sigmas", t).max())
    scale = 1.0 if rescale is None else rescale.schedule.adapter_scale(run.step(sigma), run.steps)
    acting: list[Acting] = []
    gated: list[Acting] = []
    for number in present:
        application = plan.applications[number]
        strength, at_most = _strength(application, rescale, scale)
        if strength != 0 and at_most != 0 and run.in_window(number, model.model_sampling, sigma):
            kind = gated if application.gated else acting
            on_device = torch.full((), strength, device=x.device)
            kind.append(Acting(number, strength, at_most, on_device, application.mask is not None))
    if not acting and not gated and not foreign:
        return None
    tiled = tile_rows(rows.rows, x.shape[0])
    if any(a.masked for a in (*acting, *gated)):
        window = _window(options)
        if window is not None:
            tiled = _numbered(tiled, window)
        for masked in (a for a in (*acting, *gated) if a.masked):
            _require_whole_pictures(
                run, rows.rows, x, plan.applications[masked.number], windowed=window is not None
            )
    limits = rescale is not None and rescale.mode == "limit"
    return Call(
        run=run,
        rows=tiled,
        acting=tuple(acting),
        gated=tuple(gated),
        normalized=rescale is not None,
        gates_normalized=rescale is not None and rescale.gated,
        foreign_scale=Scale(torch.full((), scale, device=x.device), limits) if foreign else None,
        latent_size=(x.shape[-2], x.shape[-1]),
        gates=loaded_gates(model, plan),
        owns_stream=not options.get("patches", {}).get("middle_patch"),
    )


def _strength(application: Application, rescale: Rescale | None, scale: float) -> tuple[float, float | None]:
    """`strength` and `at_most` of an application in one step (see `Acting`)."""
    if rescale is None or (application.gated and not rescale.gated):
        return application.weight, None
    if rescale.mode == "limit":
        return scale, application.weight
    return application.weight * scale, None


def _require_whole_pictures(
    run: Run, rows: tuple[Row, ...], x: Tensor, application: Application, windowed: bool
) -> None:
    """Raise InputError where a mask cannot be laid on the rows of a model call.

    Args:
        windowed: whether `Row.image` is known to be the latent's number in the whole batch.
    """
    (height, width), now, size = run.latent_size, run.current_size, tuple(x.shape[-2:])
    reason = None
    if abs(now[0] * width - now[1] * height) > max(height, width):
        reason = f"a sampler that changes the shape of the latent, here from {height} x {width} to {now[0]} x {now[1]}"
    elif len(rows) != x.shape[0] or any(size != (row.area or now)[:2] for row in rows):
        reason = (
            "the tiles that another node cuts this model call into, because it does not say where they lie"
        )
    elif application.masks > 1 and not windowed and max(row.image for row in rows) + 1 != run.latents:
        reason = (
            f"the tiles or windows that another node cuts the batch of {run.latents} latents into, because it does not say which they hold "
            "(one mask for all of them can)"
        )
    if reason is not None:
        raise InputError(
            f"{application.title}: attn_mask cannot follow {reason}. Sample without that node, or without the mask."
        )


def _window(options: dict[str, Any]) -> list[int] | None:
    """The latents of the batch that a model call holds, where it is a window of a longer one: AnimateDiff's or ComfyUI's own."""
    indices = (options.get("ad_params") or {}).get("sub_idxs")
    if indices is None and getattr(window := options.get("context_window"), "dim", None) == 0:
        # A latent before the window, which goes along with it.
        anchor = getattr(window, "causal_anchor_index", None)
        first = [] if anchor is None or anchor < 0 else [anchor]
        indices = [*first, *getattr(window, "index_list", ())]
    return None if indices is None else [int(index) for index in indices]


def _numbered(rows: tuple[Row, ...], window: list[int]) -> tuple[Row, ...]:
    """The rows with the latents' numbers in the whole batch in place of those in the window."""
    return tuple(replace(row, image=window[row.image]) if row.image < len(window) else row for row in rows)


def _gate_patch(run: Run) -> GatePatch:
    # The same object in every step, so that a compiled graph stays valid.
    if run.gate_patch is None:
        run.gate_patch = GatePatch(run.plan.sites)
    patch: GatePatch = run.gate_patch
    return patch


def _chain(run: Run, site: Site, previous: Replacement | None) -> SiteAttention:
    # The same object in every step, so that a compiled graph stays valid. The run keeps `previous` alive with it.
    key = (site, id(previous))
    if key not in run.chains:
        run.chains[key] = SiteAttention(site, None if previous is None else run.foreign_slot(previous))
    chain: SiteAttention = run.chains[key]
    return chain


class SiteAttention:
    """The attn2 replacement of one site: text attention (or another pack's), plus what the acting identities add."""

    def __init__(self, site: Site, previous: ForeignSlot | None):
        self.site = site
        self.previous = previous

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        call = call_of(extra)
        base = self._base(call, q, k, v, extra)
        if call is None or not call.acting:
            return base.out
        out, ours = base.out, base.fresh
        norm = sample_norm(base.text) if call.normalized else None
        rows = expand_rows(call.rows, extra, q.shape[0])
        for acting in call.acting:
            for segment in call.run.segments(rows, acting.number):
                span = slice(segment.start, segment.stop)
                identity = call.run.keys_values(
                    self.site, segment.handles, extra["n_heads"], q.device, q.dtype
                )
                mask = None
                if acting.masked:
                    size = tokens_size(extra, q.shape[1], call.latent_size)
                    mask = call.run.mask(acting.number, rows[span], size, q.device, q.dtype)
                if not ours:  # another owner may still hold this tensor
                    out, ours = out.clone(memory_format=torch.contiguous_format), True
                add_identity(
                    out[span],
                    q[span],
                    identity,
                    acting.scale,
                    base_norm=None if norm is None else norm[span],
                    at_most=acting.at_most,
                    mask=mask,
                    inplace=True,
                )
        return out

    def _base(self, call: Call | None, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Rescaled:
        """The output to add to."""
        if self.previous is None:
            out = text_attention(q, k, v, extra)
            return Rescaled(out, out, OVERRIDE not in extra and not out.requires_grad)
        if call is None or call.foreign_scale is None:
            out = self.previous.replacement(q, k, v, extra)
            return Rescaled(out, out, False)
        return self.previous.rescaled(q, k, v, extra, call.foreign_scale)
