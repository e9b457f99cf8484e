"""Warnings of a sampling run about the nodes involved: missing connections, and identities that could not act."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy.patcher_extension import WrappersMP

from . import messages
from .conditioning import PROMPTED, Prompted, attached_to, is_negative
from .messages import Message, warning
from .owners import owner_of
from .plan import KEY, Application, Plan
from .titles import APPLY, ATTACH, PROMPT, RESCALE


@dataclass
class Findings:
    """Messages grouped by the node that shows them. Nodes without messages are included, to clear their old ones."""

    plan: Plan
    _nodes: dict[tuple[str | None, str], list[Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for application in self.plan.applications:
            self.about(application.node_id, APPLY)
        if self.plan.rescale is not None:
            self.about(self.plan.rescale.node_id, RESCALE)

    def about(self, node_id: str | None, title: str, *texts: str) -> None:
        """Add warnings about a node, without duplicates."""
        known = self._nodes.setdefault((node_id, title), [])
        known += [message for message in map(warning, texts) if message not in known]

    def show(self, topic: messages.Topic) -> None:
        for (node_id, title), found in self._nodes.items():
            messages.show(node_id, title, topic, found)


def before_sampling(
    plan: Plan, conditionings: Mapping[str, Iterable[Mapping[str, Any]]], latents: int
) -> Findings:
    """Check a plan, its conditionings (by role) and the number of latents before the first model call."""
    found = Findings(plan)
    prompted: set[str] = set()
    for role, group in conditionings.items():
        for options in group:
            for attached in attached_to(options):
                wrong = attached.negative != is_negative(role)
                text = f"a conditioning with an identity attached as {attached.role} is used as {role}; attach it in the role it is used in"
                found.about(attached.node_id, ATTACH, *([text] if wrong else []))
            made_by: Prompted | None = options.get(PROMPTED)
            if made_by is None:
                continue
            wrong = is_negative(role) and not _is_zero(options.get("cross_attn"))
            found.about(made_by.node_id, PROMPT, *([_WIRED_TO_NEGATIVE] if wrong else []))
            if not is_negative(role):
                prompted.add(made_by.adapter)
    for application in plan.applications:
        if application.switched_on:
            found.about(application.node_id, APPLY, *_left_out(application, plan, prompted))
            if application.masks > 1 and application.masks != latents:
                found.about(application.node_id, APPLY, _mask_count(application.masks, latents))
    rescale = plan.rescaling
    if rescale is not None and not rescale.gated and not rescale.every_patch and plan.applications:
        if all(application.is_gated for application in plan.applications):
            found.about(rescale.node_id, RESCALE, _NOTHING_TO_RESCALE)
    return found


@dataclass(frozen=True)
class RunRecord:
    """Statistics of one sampling run."""

    calls: int  # of the model
    evaluations: int  # of the model with all conditionings
    missed: int  # evaluations without any model call
    placed: bool  # every gated layer could identify its site
    not_rescaled: tuple[str, ...]  # owners of replacements that were not rescaled


def after_sampling(plan: Plan, record: RunRecord, model_options: Mapping[str, Any]) -> Findings:
    """Report problems that showed up during sampling."""
    found = Findings(plan)
    acting = [application for application in plan.applications if application.acts]
    rescale = plan.rescaling
    if record.calls == 0:
        cause = _cause(model_options)
        for application in acting:
            found.about(application.node_id, APPLY, _silence(application, cause))
        if rescale is not None and rescale.every_patch:
            found.about(rescale.node_id, RESCALE, f"nothing was rescaled in this picture: {cause}")
    elif record.missed:
        text = f"in {record.missed} of {record.evaluations} evaluations of the model no identity could act: {_cause(model_options)}"
        for application in acting:
            found.about(application.node_id, APPLY, text)
    elif record.evaluations == 0 and rescale is not None:
        found.about(rescale.node_id, RESCALE, f"the scales of text tokens do not act: {_WRAPPERS_TAKEN}.")
    if not record.placed:
        for application in (a for a in acting if a.is_gated):
            found.about(application.node_id, APPLY, _UNPLACED)
    if plan.rescale is not None:
        for owner in sorted(set(record.not_rescaled)):
            text = (
                f"{owner} changes the text's attention itself and adds nothing to it, so it is left as it is."
            )
            found.about(plan.rescale.node_id, RESCALE, text)
    return found


def run_lost(plan: Plan) -> Findings:
    """Report that another node removed the wrapper that starts a run, so nothing can act."""
    found = Findings(plan)
    for application in plan.applications:
        if application.acts:
            found.about(
                application.node_id, APPLY, f"the identity did not act in this picture: {_WRAPPERS_TAKEN}."
            )
    return found


def _left_out(application: Application, plan: Plan, prompted: set[str]) -> list[str]:
    adapter, texts = application.adapter, []
    in_a_graph = application.node_id is not None  # prompts are only marked in a queued graph
    if in_a_graph and application.identity.text_tokens and adapter.digest not in prompted:
        texts.append(
            "no positive prompt has this adapter's identity in it, so only a part of the adapter acts. Use ID Prompt, with the same "
            "identity, in place of CLIP Text Encode for the positive prompt."
        )
    if adapter.made_to_be_rescaled and plan.rescale is None:
        texts.append(
            f"{RESCALE} is not on this model, so the identity acts as strongly as it was trained and can drown the prompt. Add the "
            "node, or add it with mode off if that is what you want."
        )
    return texts


def _silence(application: Application, cause: str) -> str:
    """Return the message for a run without model calls. Weight deltas are part of the model, so they still act."""
    if application.adapter.mechanisms.deltas:
        rest = "gated layers" if application.is_gated else "attention to the identity's tokens"
        return f"only the changed weights of this adapter acted in this picture, its {rest} did not: {cause}"
    return f"the identity did not act in this picture: {cause}"


def _mask_count(masks: int, latents: int) -> str:
    rest = "the others are not used" if masks > latents else "after the last mask they begin anew"
    return f"attn_mask is a batch of {masks} for {latents} latents: each latent takes the mask of its number, and {rest}."


def _cause(model_options: Mapping[str, Any]) -> str:
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if not wrappers.get(KEY):
        others = ", ".join(sorted(str(key) for key, some in wrappers.items() if some))
        known = f" (wrappers now on it: {others})" if others else ""
        return f"{_WRAPPERS_TAKEN}{known}."
    wrapper = model_options.get("model_function_wrapper")
    if wrapper is not None:
        return f"{owner_of(wrapper)} computes the UNet's blocks itself, past ComfyUI's hooks. Remove that node from this model."
    return "another node computes the model by itself, past ComfyUI's hooks. Remove the nodes that speed up or replace sampling."


def _is_zero(states: Any) -> bool:
    """Return whether text states come from Conditioning Zero Out, a common negative."""
    return states is not None and not bool(states.any())


_WRAPPERS_TAKEN = f"another node has taken this pack's wrappers from the model. Put {APPLY} after that node, next to the sampler"
_WIRED_TO_NEGATIVE = (
    "this prompt is wired to a negative input, so the sampler steers away from the person. Wire it to positive; the negative "
    "prompt is an ordinary CLIP Text Encode."
)
_NOTHING_TO_RESCALE = (
    f"{RESCALE} has nothing to rescale: every adapter on this model acts through gated layers. Switch `gated` on to rescale its gated layers, or "
    "remove the node."
)
_UNPLACED = (
    "another node runs transformer blocks of its own without saying which, and the identity could not act in those. Remove that "
    "node, or use an adapter without gated layers, which acts in cross-attention."
)
