"""Together with the host's other features: LoRAs, changed noise schedules, guidance tricks, compilation, attention overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes.sampling import (
    KINDS,
    SITE_COUNT,
    apply,
    difference,
    draw,
    noise,
    person,
    record,
    rescale,
    unet,
)


def with_lora(model: Any) -> Any:
    """A clone with changed K and V weights of its cross-attention."""
    weights = {
        key: weight
        for key, weight in model.model_state_dict().items()
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    patches = {
        key: ("diff", (recipe.weight(9, key, weight.shape).to(weight),)) for key, weight in weights.items()
    }
    clone = model.clone()
    assert len(clone.add_patches(patches, 0.8)) == len(patches)
    return clone


def with_node(module: str, name: str, method: str, *arguments: Any) -> Callable[[Any], Any]:
    """One of ComfyUI's nodes that take a MODEL and give a MODEL."""

    def change(model: Any) -> Any:
        import importlib

        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        result = getattr(node if method == "execute" else node(), method)(model, *arguments)
        return getattr(result, "result", result)[0]

    return change


OTHERS: dict[str, Callable[[Any], Any]] = {
    "lora": with_lora,
    "model sampling": with_node(
        "nodes_model_advanced", "ModelSamplingDiscrete", "patch", "v_prediction", True
    ),
    "rescale cfg": with_node("nodes_model_advanced", "RescaleCFG", "patch", 0.7),
    "freeu": with_node("nodes_freelunch", "FreeU_V2", "execute", 1.3, 1.4, 0.9, 0.2),
    "hypertile": with_node("nodes_hypertile", "HyperTile", "execute", 64, 2, 0, False),
    "token merging": with_node("nodes_tomesd", "TomePatchModel", "execute", 0.5),
}


@pytest.mark.parametrize("other", OTHERS)
def test_before_or_after(other: str) -> None:
    kind, change = "sd15", OTHERS[other]
    options: dict[str, Any] = {"latent_noise": noise(1, 16, 16)}

    def ours(model: Any) -> Any:
        return rescale(apply(model, kind, person(kind)), adapter_early=0.8)

    torch.manual_seed(0)
    before = draw(ours(change(unet(kind))), kind, **options)
    torch.manual_seed(0)
    after = draw(change(ours(unet(kind))), kind, **options)
    assert before.isfinite().all()
    assert torch.equal(before, after)
    assert difference(before, draw(change(unet(kind)), kind, **options)) > 0.01
    assert difference(before, draw(ours(unet(kind)), kind, **options)) > 1e-3


def test_window_follows_a_changed_noise_schedule() -> None:
    kind = "sdxl"
    changed = OTHERS["model sampling"](apply(unet(kind), kind, person(kind), 1.0, 0.0, 0.5))
    sampling = changed.get_model_object("model_sampling")
    model, calls = record(changed)
    draw(model, kind, steps=6)
    border = sampling.percent_to_sigma(0.5)
    assert border != pytest.approx(unet(kind).get_model_object("model_sampling").percent_to_sigma(0.5))
    assert [call.own is not None for call in calls] == [call.sigma > border for call in calls]
    assert len({call.own is not None for call in calls}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_text_attention_is_the_hosts_own(kind: str) -> None:
    """An override of ComfyUI's attention serves the text attention of every site, precision and all; its tensor is its own."""
    seen: list[dict[str, Any]] = []
    given: list[tuple[Tensor, Tensor]] = []

    def override(attention: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        out: Tensor = attention(q, k, v, heads, **options)
        if k.shape[1] == 77:
            seen.append(options)
            given.append((out, out.clone()))
        return out

    base = unet(kind).clone()
    base.model_options["transformer_options"]["optimized_attention_override"] = override
    draw(apply(base, kind, person(kind)), kind, steps=1)
    assert len(seen) == SITE_COUNT[kind]
    wanted = torch.float32 if kind == "sd21" else None  # SD2.x asks for fp32 attention
    assert all(options["attn_precision"] == wanted for options in seen)
    for out, copy in given:
        assert torch.equal(out, copy), "the override's tensor was overwritten"


def test_compiled_model() -> None:
    """ComfyUI's own compile node drops the guards that would tell two identities apart."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    kind = "sd15"
    for strength, number in ((1.0, 1), (0.6, 2)):
        applied = rescale(
            apply(unet(kind), kind, person(kind, number), strength, 0.0, 0.9), adapter_early=0.5
        )
        compiled = TorchCompileModel.execute(applied, "eager").result[0]
        assert difference(draw(compiled, kind, steps=2), draw(applied, kind, steps=2)) < 1e-5
