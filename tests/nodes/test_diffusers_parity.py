"""Adapters in a diffusers UNet, where they are trained, and in ComfyUI, where they are used: one and the same model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.adapter import load_adapter, save_adapter
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.types import Mix
from tests.golden.compare import TOLERANCE, assert_published
from tests.nodes.sampling import KINDS, node, noise, prompt, rescale, same_states, sample
from tests.tiny.checkpoints import tiny_unet
from tests.tiny.diffusers_unet import diffusers_unet
from tests.tiny.features import face_features
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features
from tests.tiny.ip_adapter import CONFIGS as FACEID_CONFIGS, published, with_lora, write_published
from tests.tiny.uniid import CONFIGS as UNIID_CONFIGS, tiny_uniid

STEPS = 2


@dataclass(frozen=True)
class Call:
    """One call of ComfyUI's UNet, of a real run: what went in and what came out, row by row."""

    x: Tensor
    timestep: Tensor
    context: Tensor
    y: Tensor | None
    out: Tensor
    positive: Tensor  # (rows,) bool


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    """ComfyUI's MODEL."""
    return tiny_unet(kind)


@pytest.fixture(scope="module")
def unet(kind: str) -> Any:
    """diffusers' UNet with the weights of ComfyUI's."""
    from comfy.utils import unet_to_diffusers

    untouched = tiny_unet(kind).model
    weights = untouched.diffusion_model.state_dict()
    names = unet_to_diffusers(untouched.model_config.unet_config)
    converted = diffusers_unet(kind)
    missing = set(weights) - {names[name] for name in converted.state_dict()}
    assert not missing, "weights of ComfyUI's UNet without a place in diffusers'"
    converted.load_state_dict({name: weights[names[name]] for name in converted.state_dict()})
    return converted


def run(model: Any, kind: str) -> list[Call]:
    """The calls of the UNet while KSampler draws a 8 x 12 latent with two prompts."""
    from comfy.patcher_extension import WrappersMP

    positive, negative = prompt(kind, "positive"), prompt(kind, "negative")
    calls: list[Call] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        x, timestep, context, y = (None if part is None else part.clone() for part in args[:4])
        out = executor(*args, **kwargs)
        rows = [same_states(row, positive) for row in context]
        assert [same_states(row, negative) for row in context] == [not row for row in rows]
        calls.append(Call(x, timestep, context, y, out.clone(), torch.tensor(rows)))
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "parity", note)
    sample(clone, positive, negative, latent_noise=noise(1, 8, 12), steps=STEPS)
    assert len(calls) == STEPS
    assert all(sorted(call.positive.tolist()) == [False, True] for call in calls)
    return calls


def predict(unet: Any, call: Call, **more: Any) -> Tensor:
    """What diffusers' UNet makes of the inputs of a call."""
    added: dict[str, Any] = dict(more)
    if call.y is not None:  # pooled text, then the embedded sizes
        height, width = (8 * side for side in call.x.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        added |= {"text_embeds": call.y[:, :64], "time_ids": sizes.expand(len(call.x), -1)}
    with torch.no_grad():
        out: Tensor = unet(
            call.x.clone(), call.timestep.clone(), call.context.clone(), added_cond_kwargs=added or None
        ).sample
    return out


def compare(name: str, unet: Any, calls: list[Call]) -> None:
    for step, call in enumerate(calls):
        assert_published(f"{name}, step {step}", predict(unet, call), call.out)


def test_the_base_models_agree(kind: str, model: Any, unet: Any) -> None:
    compare(f"{kind}, no adapter", unet, run(model, kind))


@pytest.mark.parametrize("case", ["as trained", "half, two photos", "resampled"])
def test_an_idadapter_does_the_same_in_both(
    case: str, kind: str, model: Any, unet: Any, tmp_path: Path
) -> None:
    from ComfyUI_IDAdapter.nodes.adapter import load

    weight, photos = (0.5, 2) if case == "half, two photos" else (1.0, 4)
    config = replace(CONFIGS[kind], tokens=5, resampler_depth=1) if case == "resampled" else CONFIGS[kind]
    file = tmp_path / "adapter.safetensors"
    save_adapter(tiny_idadapter(config), file)
    loaded = load(str(file), None)
    identity = loaded.adapter.encode(vision_features(3, photos), Mix())
    # Two photos for an adapter trained with four count twice each, by a bias.
    assert (identity.adapter_bias is None) == (photos == 4)
    calls = run(node("IDAdapterApply", model, loaded, identity, weight, 0.0, 1.0, None), kind)

    bare = [predict(unet, call) for call in calls]
    injected = inject(unet, load_adapter(file))
    try:
        for step, call in enumerate(calls):
            bias = None if identity.adapter_bias is None else identity.adapter_bias[0]
            with injected.identity(identity.adapter_tokens, weight, bias=bias, rows=call.positive):
                out = predict(unet, call)
            assert_published(f"{kind}, {case}, step {step}", out, call.out)
            with injected.identity(None, strength=weight):
                without_identity = predict(unet, call)
            assert torch.equal(out[~call.positive], without_identity[~call.positive])
            for row in (0, 1):
                assert (out[row] - bare[step][row]).abs().max() > 100 * TOLERANCE, (
                    "the adapter changes nothing"
                )
            gates = (out - without_identity)[call.positive].abs().max()
            assert gates > 100 * TOLERANCE, "the gates change nothing"
    finally:
        injected.eject()
    assert all(torch.equal(predict(unet, call), plain) for call, plain in zip(calls, bare, strict=True))


@pytest.mark.parametrize("case", ["as trained", "half", "rescaled"])
def test_a_uniid_adapter_does_the_same_in_both(
    case: str, kind: str, model: Any, unet: Any, tmp_path: Path
) -> None:
    """Positive rows with the person's tokens, negative ones with those of zeroed features."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    weight = 1.0 if case == "as trained" else 0.5
    file = tmp_path / "adapter.safetensors"
    save_adapter(tiny_uniid(UNIID_CONFIGS[kind]), file)
    loaded = load(str(file), None)
    identity = loaded.adapter.encode(face_features(3), Mix())
    applied = node("IDAdapterApply", model, loaded, identity, weight, 0.0, 1.0, None)
    scales = [1.0, 1.0]
    if case == "rescaled":
        scales = [0.8, 1.6]  # of the first and the second step
        applied = rescale(applied, adapter_early=scales[0], adapter_late=scales[1])
    calls = run(applied, kind)

    bare = [predict(unet, call) for call in calls]
    with inject(unet, load_adapter(file)) as injected:
        for step, call in enumerate(calls):
            tokens = torch.where(
                call.positive[:, None, None], identity.adapter_tokens, identity.adapter_tokens_uncond
            )
            with injected.identity(tokens, weight * scales[step], rescale=case == "rescaled"):
                out = predict(unet, call)
            assert_published(f"{kind}, UniID, {case}, step {step}", out, call.out)
            for row in (0, 1):
                assert (out[row] - bare[step][row]).abs().max() > 100 * TOLERANCE, (
                    "the adapter changes nothing"
                )
    assert all(torch.equal(predict(unet, call), plain) for call, plain in zip(calls, bare, strict=True))


def test_a_faceid_does_what_diffusers_own_loader_does(
    kind: str, model: Any, unet: Any, tmp_path: Path
) -> None:
    """The published file in ComfyUI, its LoRA included, against diffusers' loader of the same file."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    config = FACEID_CONFIGS[kind]
    loaded = load(write_published(tmp_path / "faceid.bin", config), None)
    features = face_features(3)
    identity = loaded.adapter.encode(features, Mix())
    calls = run(node("IDAdapterApply", model, loaded, identity, 1.0, 0.0, 1.0, None), kind)
    reference = with_lora(deepcopy(unet), published(config)["ip_adapter"])
    reference._load_ip_adapter_weights([published(config)])
    for processor in reference.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [1.0]
    direction = torch.nn.functional.normalize(features.embedding, dim=-1)
    for step, call in enumerate(calls):
        shown = torch.where(call.positive[:, None], direction, torch.zeros_like(direction))
        out = predict(reference, call, image_embeds=[shown[:, None]])
        assert_published(f"{kind}, FaceID, step {step}", out, call.out)
        assert (out - predict(unet, call)).abs().max() > 100 * TOLERANCE, "the adapter changes nothing"
