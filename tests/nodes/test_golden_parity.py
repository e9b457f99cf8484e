"""The published UniID numbers, through the pack's own patch on ComfyUI's UNet."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.golden import recipe
from tests.golden.compare import TOLERANCE, assert_published
from tests.tiny.checkpoints import golden_unet
from tests.tiny.uniid import GOLDEN, tiny_adapter

FILE = Path(__file__).parents[1] / "golden" / "uniid_sdxl_like.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with safe_open(FILE, "pt") as file:
        values: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        values["metadata"] = file.metadata()
    return values


def case_numbers() -> list[int]:
    with safe_open(FILE, "pt") as file:
        return list(range(len(json.loads(file.metadata()["cases"]))))


@pytest.fixture(scope="module")
def patched(
    pack: ModuleType, golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """The golden UNet as a MODEL, and the golden adapter read from files in the published layout."""
    seed = int(golden["metadata"]["seed"])
    return golden_unet(), tiny_adapter(GOLDEN, tmp_path_factory.mktemp("golden"), seed)


def features(seed: int, batch: int) -> Any:
    from ComfyUI_IDAdapter.idadapter_core import FaceFeatures

    shapes = [(64, 56), (128, 28), (256, 14), (512, 7)]
    return FaceFeatures(
        embedding=recipe.value(seed, "face_embedding", (batch, 512)),
        stages=tuple(
            recipe.value(seed, f"face_stage{i + 1}", (batch, channels, side, side))
            for i, (channels, side) in enumerate(shapes)
        ),
    )


def predict(model: Any, golden: dict[str, Any], timestep: int, positive: dict[str, Any]) -> torch.Tensor:
    """[uncond, cond] noise predictions as ComfyUI's sampling computes them, with the MODEL's wrappers at work."""
    import comfy.conds
    import comfy.model_management
    import comfy.samplers

    metadata = golden["metadata"]
    seed, size, length = int(metadata["seed"]), int(metadata["latent_size"]), int(metadata["prompt_length"])
    comfy.model_management.load_models_gpu([model])
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigma(torch.tensor([float(timestep)]))
    latent = recipe.value(seed, "latent", (1, 4, size, size))
    noisy = latent * (sigma**2 + sampling.sigma_data**2).sqrt()
    y = golden["y"]
    negative = {"c_crossattn": recipe.value(seed, "negative", (1, length, 320))}

    def conditioning(states: dict[str, Any], row: int) -> dict[str, Any]:
        model_conds = {
            "c_crossattn": comfy.conds.CONDCrossAttn(states["c_crossattn"]),
            "y": comfy.conds.CONDRegular(y[row : row + 1]),
        }
        return {"model_conds": model_conds, "uuid": row, **states.get("options", {})}

    class Guider:
        """What the OUTER_SAMPLE wrapper sees of a guider: it tags these conditionings."""

        model_options = model.model_options
        conds = {"negative": [conditioning(negative, 0)], "positive": [conditioning(positive, 1)]}  # noqa: RUF012

    result: list[torch.Tensor] = []

    def sample(*_: Any) -> torch.Tensor:
        options = {
            **model.model_options,
            "transformer_options": dict(model.model_options["transformer_options"]),
        }
        options["transformer_options"]["wrappers"] = model.wrappers
        conds = [Guider.conds["negative"], Guider.conds["positive"]]
        result.extend(comfy.samplers.calc_cond_batch(model.model, conds, noisy, sigma, options))
        return noisy

    from comfy.patcher_extension import WrapperExecutor, WrappersMP

    wrappers = [w for group in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).values() for w in group]
    sigmas = torch.cat(
        [sampling.sigma(torch.tensor([999.0])), sampling.sigma(torch.tensor([500.0])), torch.zeros(1)]
    )
    executor = WrapperExecutor.new_class_executor(sample, Guider, wrappers)
    model.pre_run()
    executor.execute(noisy, None, None, sigmas)
    model.cleanup()
    return (noisy - torch.cat(result)) / sigma.view(-1, 1, 1, 1)


def test_plain_unet_is_the_published_one(patched: tuple[Any, Any], golden: dict[str, Any]) -> None:
    model, _ = patched
    metadata = golden["metadata"]
    prompt = {
        "c_crossattn": recipe.value(int(metadata["seed"]), "prompt", (1, int(metadata["prompt_length"]), 320))
    }
    out = predict(model, golden, int(metadata["plain_timestep"]), prompt)
    assert_published("plain UNet", out, golden["plain.eps_uncond_then_cond"])


@pytest.mark.parametrize("number", case_numbers())
def test_unet_case_is_the_published_one(
    patched: tuple[Any, Any], golden: dict[str, Any], number: int
) -> None:
    from ComfyUI_IDAdapter.idadapter_core.mechanisms.text import normalize_text_tokens
    from ComfyUI_IDAdapter.idadapter_core.schedule import RescaleSchedule
    from ComfyUI_IDAdapter.nodes.host.conditioning import TEXT_POSITIONS
    from ComfyUI_IDAdapter.nodes.host.model import with_plan
    from ComfyUI_IDAdapter.nodes.host.plan import Application, Rescale, plan_of

    model, adapter = patched
    metadata = golden["metadata"]
    seed = int(metadata["seed"])
    case = json.loads(metadata["cases"])[number]
    identity = adapter.encode(features(seed, 1))
    scale, text_scale = case["adapter_scale"], case["text_scale"]
    application = Application(adapter, identity, 1.0 if case["normalized"] else scale, 0.0, 1.0, None)
    schedule = RescaleSchedule(scale, scale, text_scale, text_scale)
    changed = with_plan(
        model, applications=(application,), rescale=Rescale(schedule) if case["normalized"] else None
    )
    assert len(plan_of(changed).sites) == 17

    states = recipe.value(seed, "prompt", (1, int(metadata["prompt_length"]), 320))
    positive: dict[str, Any] = {"c_crossattn": states}
    if case["text_branch"]:
        norms = {
            "l": recipe.value(seed, "reference_norm_l", (3, 1)).abs()[:, 0] * 10 + 5,
            "g": recipe.value(seed, "reference_norm_g", (3, 1)).abs()[:, 0] * 20 + 5,
        }
        tokens = normalize_text_tokens(identity.text_tokens, norms)
        assert (tokens - golden["text_tokens_normalized"]).abs().max() < TOLERANCE
        positive = {
            "c_crossattn": torch.cat([states[:, :1], tokens, states[:, 1:-3]], dim=1),
            "options": {TEXT_POSITIONS: (1, 2, 3)},
        }
    out = predict(changed, golden, case["timestep"], positive)
    assert_published(f"UNet, case {number}", out, golden[f"case{number}.eps_uncond_then_cond"])
    plain = predict(model, golden, case["timestep"], {"c_crossattn": states})
    assert (out - plain).abs().max() > 100 * TOLERANCE, "the adapter changes nothing"
