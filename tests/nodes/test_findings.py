"""Silence is a fault: what could act and did not, and what the user left out, is said on the node that it is about."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.comfy import pack_nodes
from tests.nodes import idadapter_sampling
from tests.nodes.idadapter_sampling import Made
from tests.nodes.sampling import (
    Conditioning,
    adapter,
    apply,
    attach,
    difference,
    draw,
    node,
    noise,
    person,
    prompt,
    rescale,
    sample,
    unet,
)
from tests.tiny.features import face_features
from tests.tiny.ip_adapter import CONFIGS as FACEID_CONFIGS, write_published

APPLY, RESCALE = "Apply ID Adapter", "Normalized Identity Rescaling"
WarningsOn = Callable[[str], list[str]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[str]]:
    """The texts that each node shows on each topic, as the frontend is told: what comes later takes their place."""
    from server import PromptServer

    shown: dict[tuple[str, str], list[str]] = {}

    def send(event: str, data: dict[str, Any], client: str) -> None:
        assert event == "idadapter.messages"
        shown[data["node"], data["topic"]] = [message["text"] for message in data["messages"]]

    server = SimpleNamespace(client_id="browser", send_sync=send, last_prompt_id="prompt")
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    return shown


def in_graph(node_id: str, number: str, *arguments: Any, **inputs: Any) -> Any:
    """Execute a node of the pack as part of a queued prompt."""
    node = pack_nodes()[node_id]
    hidden = SimpleNamespace(unique_id=number, prompt={}, extra_pnginfo=None)
    clone = type(node.__name__, (node,), {"hidden": hidden})
    with torch.inference_mode():
        return clone.execute(*arguments, **inputs).result[0]


def applied(kind: str, number: str = "7", **changes: Any) -> Any:
    identity = replace(person(kind), **changes)
    return in_graph("IDAdapterApply", number, unet(kind), adapter(kind), identity, 1.0, 0.0, 1.0)


def prompted(kind: str, name: str, number: str = "3") -> Conditioning:
    """A conditioning as ID Prompt makes it."""
    from ComfyUI_IDAdapter.nodes.host.conditioning import PROMPTED, Prompted

    return prompt(kind, name, **{PROMPTED: Prompted(adapter(kind).adapter.digest, number)})


# --- another node computes the model past us -------------------------------------------------------------------------


def past_the_hooks(model: Any, begin: int = 0) -> Any:
    """DeepCache: the UNet's own forward, called from a function wrapper, from a step on."""
    steps = itertools.count()

    def deep_cache(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        base = model.model
        if next(steps) < begin:
            out: Tensor = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
            return out
        x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
        scaled = base.model_sampling.calculate_input(t, x)
        options = {
            name: value for name, value in c["transformer_options"].items() if not name.startswith("patch")
        }
        out = base.diffusion_model(
            scaled, base.model_sampling.timestep(t).float(), c["c_crossattn"], transformer_options=options
        )
        return base.model_sampling.calculate_denoised(t, out, x)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(deep_cache)
    return clone


def taking_wrappers(model: Any, *kinds: str) -> Any:
    """BrushNet: an update that takes the place of whatever wrappers of these kinds there were."""

    def passing(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.wrappers.update({kind: {None: [passing]} for kind in kinds})
    return clone


def test_a_node_that_computes_the_model_itself_is_named(warnings_on: WarningsOn) -> None:
    model = past_the_hooks(rescale(apply(unet("sd15"), "sd15", person("sd15"))))
    assert difference(draw(model, "sd15"), draw(unet("sd15"), "sd15")) < 1e-5
    (said,) = warnings_on(APPLY)
    assert said.startswith("the identity did not act in this picture")
    assert "(past_the_hooks)" in said


@pytest.mark.parametrize(
    "kinds",
    [
        ("apply_model",),
        ("outer_sample",),
        ("apply_model", "outer_sample"),
        ("outer_sample", "calc_cond_batch"),
    ],
    ids="+".join,
)
def test_wrappers_that_were_taken_away(kinds: tuple[str, ...], warnings_on: WarningsOn) -> None:
    model = taking_wrappers(rescale(apply(unet("sd15"), "sd15", person("sd15"))), *kinds)
    want = draw(unet("sd15"), "sd15", steps=4)
    assert torch.equal(draw(model, "sd15", steps=4), want)
    (said,) = warnings_on(APPLY)  # once in a run, not at each step
    assert "another node has taken this pack's wrappers from the model" in said
    assert "Put Apply ID Adapter after that node" in said
    draw(model, "sd15", steps=4)
    assert len(warnings_on(APPLY)) == 2
    # The way out that it names.
    after = rescale(apply(taking_wrappers(unet("sd15"), *kinds), "sd15", person("sd15")))
    assert not torch.equal(draw(after, "sd15", steps=4), want)
    assert len(warnings_on(APPLY)) == 2


@pytest.mark.parametrize(
    ("delta", "missing"), [(0.0, "the identity did not"), (0.3, "only the changed weights")]
)
def test_gated_adapters_are_told_too(delta: float, missing: str, warnings_on: WarningsOn) -> None:
    """Their changed K and V weights are the model's own, and act all the same."""
    made = Made("sd15", delta=delta)
    gated = idadapter_sampling.apply(unet("sd15"), made, idadapter_sampling.person(made))
    found = draw(past_the_hooks(gated), "sd15")
    (said,) = warnings_on(APPLY)
    assert said.startswith(missing)
    assert (difference(found, draw(unet("sd15"), "sd15")) > 1e-3) == bool(delta)


def test_an_adapter_with_a_lora_is_told_too(warnings_on: WarningsOn, tmp_path: Path) -> None:
    """Its LoRA is the model's own, and acts all the same."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    loaded = load(write_published(tmp_path / "faceid.bin", FACEID_CONFIGS["sd15"]), None)
    identity = loaded.adapter.encode(face_features(3))
    model = node("IDAdapterApply", unet("sd15"), loaded, identity, 1.0, 0.0, 1.0, None)
    found = draw(past_the_hooks(model), "sd15")
    said = warnings_on(APPLY)[-1]
    assert said.startswith(
        "only the changed weights of this adapter acted in this picture, its attention to the identity's tokens did"
    )
    assert difference(found, draw(unet("sd15"), "sd15")) > 1e-3


def test_foreign_rescaling_is_told_too(warnings_on: WarningsOn) -> None:
    draw(past_the_hooks(rescale(unet("sd15"), scope="every attention patch")), "sd15")
    assert [text for text in warnings_on(RESCALE) if text.startswith("nothing was rescaled in this picture")]


@pytest.mark.parametrize(
    "options", [{}, {"cfg": 1.0}, {"sampler": "heun"}, {"denoise": 0.5}, {"steps": 1}], ids=str
)
def test_nothing_is_said_where_all_is_well(options: dict[str, Any], warnings_on: WarningsOn) -> None:
    draw(rescale(apply(unet("sd15"), "sd15", person("sd15"))), "sd15", **options)
    made = Made("sd15")
    draw(idadapter_sampling.apply(unet("sd15"), made, idadapter_sampling.person(made)), "sd15", **options)
    assert not warnings_on(APPLY)
    assert not warnings_on(RESCALE)


@pytest.mark.parametrize(("weight", "end"), [(0.0, 1.0), (1.0, 0.0)])
def test_what_is_switched_off_is_not_missed(weight: float, end: float, warnings_on: WarningsOn) -> None:
    draw(past_the_hooks(apply(unet("sd15"), "sd15", person("sd15"), weight, 0.0, end)), "sd15")
    assert not [text for text in warnings_on(APPLY) if "did not act in this picture" in text]


def test_a_node_that_does_so_in_some_steps_is_told_too(warnings_on: WarningsOn) -> None:
    draw(past_the_hooks(rescale(apply(unet("sd15"), "sd15", person("sd15"))), begin=1), "sd15", steps=4)
    (said,) = warnings_on(APPLY)
    assert said.startswith("in 3 of 4 evaluations of the model no identity could act")
    assert "(past_the_hooks)" in said


def test_the_wrapper_of_text_tokens_alone(warnings_on: WarningsOn) -> None:
    model = taking_wrappers(rescale(apply(unet("sd15"), "sd15", person("sd15"))), "calc_cond_batch")
    draw(model, "sd15")
    assert not warnings_on(APPLY)
    (said,) = warnings_on(RESCALE)
    assert said.startswith("the scales of text tokens do not act: another node has taken")


def test_refusals_within_the_model_name_a_node() -> None:
    """The node that runs is the sampler, which the user has nothing to change on."""

    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        c = {**arguments["c"], "c_crossattn": arguments["c"]["c_crossattn"][:1]}
        out: Tensor = apply_model(arguments["input"][:1], arguments["timestep"][:1], **c)
        return out.repeat(2, 1, 1, 1)

    model = applied("sd15", "12").clone()
    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(RuntimeError, match=r"^Apply ID Adapter \(node 12\): another node changed the batch"):
        draw(model, "sd15")


# --- the user left something out -------------------------------------------------------------------------------------


def test_apply_without_id_prompt(events: dict[tuple[str, str], list[str]]) -> None:
    kind = "sdxl"
    model = rescale(applied(kind))
    sample(model, prompt(kind, "positive"), prompt(kind, "negative"))
    (said,) = events["7", "run"]
    assert said.startswith("no positive prompt has this adapter's identity in it")
    # Mended: the message goes.
    sample(model, prompted(kind, "positive"), prompt(kind, "negative"))
    assert events["7", "run"] == []
    assert events["3", "run"] == []
    # Not mended: as the negative.
    sample(model, prompt(kind, "positive"), prompted(kind, "negative"))
    assert len(events["7", "run"]) == 1


def test_an_adapter_without_text_branch_needs_no_id_prompt(events: dict[tuple[str, str], list[str]]) -> None:
    draw(rescale(applied("sdxl", text_tokens={})), "sdxl")
    assert events["7", "run"] == []


def test_a_prompt_wired_to_negative(events: dict[tuple[str, str], list[str]]) -> None:
    kind = "sd15"
    model = rescale(applied(kind))
    sample(model, prompted(kind, "positive", "3"), prompted(kind, "negative", "4"))
    assert events["3", "run"] == []
    (said,) = events["4", "run"]
    assert "wired to a negative input" in said
    # Conditioning Zero Out of the positive is a usual negative.
    ((states, options),) = prompted(kind, "positive", "4")
    sample(model, prompted(kind, "positive", "3"), [[torch.zeros_like(states), options]])
    assert events["4", "run"] == []


@pytest.mark.parametrize(
    ("rescaled", "expected"),
    [
        (lambda model: model, True),
        (rescale, False),
        (lambda model: rescale(model, "limit"), False),
        (lambda model: rescale(model, "off"), False),
    ],
    ids=["none", "normalized", "limit", "off"],
)
def test_uniid_without_rescaling(
    rescaled: Callable[[Any], Any], expected: bool, events: dict[tuple[str, str], list[str]]
) -> None:
    kind = "sd15"
    sample(rescaled(applied(kind)), prompted(kind, "positive"), prompt(kind, "negative"))
    said = events["7", "run"]
    assert bool(said) == expected
    assert all("Normalized Identity Rescaling is not on this model" in text for text in said)


def test_idadapter_without_rescaling_is_as_it_should_be(warnings_on: WarningsOn) -> None:
    made = Made("sd15")
    draw(idadapter_sampling.apply(unet("sd15"), made, idadapter_sampling.person(made)), "sd15")
    assert not warnings_on(APPLY)


def test_an_identity_attached_in_the_wrong_role(warnings_on: WarningsOn) -> None:
    kind, identity = "sd15", person("sd15")
    model = rescale(apply(unet(kind), kind, identity))
    sample(model, prompt(kind, "positive"), attach(prompt(kind, "negative"), identity, "positive"))
    (said,) = warnings_on("Attach Identity to Conditioning")
    assert "attached as positive is used as negative" in said


@pytest.mark.parametrize(("masks", "said"), [(3, "the others are not used"), (2, None), (1, None)])
def test_masks_that_are_not_as_many_as_the_latents(
    masks: int, said: str | None, warnings_on: WarningsOn
) -> None:
    model = apply(unet("sd15"), "sd15", person("sd15"), mask=torch.ones(masks, 8, 8))
    draw(rescale(model), "sd15", latent_noise=noise(2))
    assert [said in text for text in warnings_on(APPLY)] == ([True] if said else [])


def test_messages_of_a_run_do_not_stay(events: dict[tuple[str, str], list[str]]) -> None:
    kind = "sd15"
    model = rescale(applied(kind))
    draw(past_the_hooks(model), kind)
    assert len(events["7", "result"]) == 1
    draw(model, kind)
    assert events["7", "result"] == []


# --- a queued graph --------------------------------------------------------------------------------------------------

SOCKETS = {
    "CheckpointLoaderSimple": ({}, ("MODEL", "CLIP", "VAE")),
    "IDAdapterApply": ({"model": "MODEL"}, ("MODEL",)),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ("MODEL",)),
    "IDAdapterPrompt": ({"clip": "CLIP"}, ("CONDITIONING", "STRING")),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("CONDITIONING",)),
    "IDAdapterAttach": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "KSampler": ({"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}, ("LATENT",)),
    "CFGGuider": ({"model": "MODEL", "positive": "CONDITIONING"}, ("GUIDER",)),
    "Switch": ({"a": "*"}, ("*",)),
    "ConditioningPreview": ({"conditioning": "CONDITIONING"}, ()),
}


def told(prompt: dict[str, Any]) -> dict[str, int]:
    """How many messages each node of a queued prompt gets."""
    from ComfyUI_IDAdapter.nodes.host.graph import Sockets, omissions

    def sockets_of(name: str) -> Any:
        return Sockets(*SOCKETS.get(name, ({}, ())))

    return {node: len(found) for node, found in omissions(prompt, sockets_of).items()}


def graph(**nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


LOADER = ("CheckpointLoaderSimple", {"ckpt_name": "a"})
TEXT = ("IDAdapterPrompt", {"clip": ["1", 1], "text": "a"})


def sampler(model: str, positive: str) -> tuple[str, dict[str, Any]]:
    return "KSampler", {"model": [model, 0], "positive": [positive, 0], "seed": 3}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"1": LOADER, "2": TEXT, "3": sampler("1", "2")}, {"2": 1}),
        (
            {"1": LOADER, "2": TEXT, "3": sampler("4", "2"), "4": ("IDAdapterApply", {"model": ["1", 0]})},
            {"2": 0},
        ),
        # Far away on both sides, through a switch.
        (
            {
                "1": LOADER,
                "2": TEXT,
                "3": ("CFGGuider", {"model": ["6", 0], "positive": ["5", 0]}),
                "4": ("IDAdapterApply", {"model": ["1", 0]}),
                "5": ("IDAdapterAttach", {"conditioning": ["2", 0]}),
                "6": ("Switch", {"a": ["7", 0]}),
                "7": ("LoraLoaderModelOnly", {"model": ["4", 0]}),
            },
            {"2": 0, "5": 0},
        ),
        # An Apply on a model that samples with another prompt does not count.
        (
            {
                "1": LOADER,
                "2": TEXT,
                "3": sampler("1", "2"),
                "4": ("IDAdapterApply", {"model": ["1", 0]}),
                "5": ("CLIPTextEncode", {"clip": ["1", 1]}),
                "6": sampler("4", "5"),
                "7": ("IDAdapterAttach", {"conditioning": ["5", 0]}),
            },
            {"2": 1, "7": 0},
        ),
        ({"1": LOADER, "2": TEXT, "3": ("ConditioningPreview", {"conditioning": ["2", 0]})}, {"2": 1}),
        # Where the two meet cannot be seen.
        (
            {
                "1": LOADER,
                "2": TEXT,
                "3": ("SomePipe", {"x": ["2", 0], "y": ["4", 0]}),
                "4": ("IDAdapterApply", {"model": ["1", 0]}),
            },
            {"2": 0},
        ),
        ({"1": LOADER, "2": TEXT}, {"2": 0}),  # not used at all
        (
            {"1": LOADER, "2": ("IDAdapterAttach", {"conditioning": ["2", 0]}), "3": sampler("1", "2")},
            {"2": 1},
        ),
    ],
    ids=["missing", "there", "far", "elsewhere", "no sampler", "pipe", "unused", "circle"],
)
def test_an_identity_in_a_prompt_without_apply(nodes: dict[str, Any], expected: dict[str, int]) -> None:
    assert told(graph(**nodes)) == expected


@pytest.mark.parametrize(
    "broken",
    [None, [], "text", {"prompt": None}, {"prompt": []}, {"prompt": {"1": None, "2": {}, "3": {"inputs": 5}}},
     {"prompt": {"1": {"class_type": "IDAdapterPrompt", "inputs": {"a": ["9", 0], "b": [[], {}], "c": ["1", "x"]}}}}],
    ids=str,
)  # fmt: skip
def test_a_prompt_of_any_shape_is_handed_on(broken: Any) -> None:
    """ComfyUI refuses what is wrong with it."""
    from ComfyUI_IDAdapter.nodes.host.graph import on_prompt

    assert on_prompt(broken) is broken
