"""Half and quarter precision of the base model and of the adapter's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.nodes.sampling import CONFIGS, SEEDS, apply, difference, draw, node, person, rescale, unet
from tests.tiny.checkpoints import tiny_unet
from tests.tiny.uniid import uniid_state


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float8_e4m3fn, 0.5)],
    ids=["fp16", "bf16", "fp8"],
)
def test_base_weights(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    base, identity = tiny_unet(kind, dtype=dtype), person(kind)

    def identity_effect(model: object) -> torch.Tensor:
        return draw(rescale(apply(model, kind, identity)), kind, cfg=1.0) - draw(model, kind, cfg=1.0)

    result = draw(rescale(apply(base, kind, identity)), kind, cfg=1.0)
    assert result.isfinite().all()
    assert difference(result, draw(rescale(apply(unet(kind), kind, identity)), kind, cfg=1.0)) < tolerance
    # What the identity changes, apart from how the base model itself has been rounded.
    assert difference(identity_effect(base), identity_effect(unet(kind))) < 4 * tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    """As on a GPU: the layers themselves hand half precision to the replacement."""
    kind = "sdxl"
    half = tiny_unet(kind, dtype=dtype)
    half.model.manual_cast_dtype = None
    half.set_model_compute_dtype(dtype)
    identity = person(kind)
    result = draw(rescale(apply(half, kind, identity, mask=torch.ones(1, 8, 8))), kind)
    assert result.isfinite().all()
    assert difference(result, draw(rescale(apply(unet(kind), kind, identity)), kind)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_adapter_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    from ComfyUI_IDAdapter.nodes.adapter import load

    kind = "sdxl"
    state = {key: tensor.to(dtype) for key, tensor in uniid_state(CONFIGS[kind], SEEDS[kind]).items()}
    file = tmp_path / "half.bin"
    torch.save(state, file)
    loaded = load(file, None)
    identity = replace(person(kind), adapter=loaded.adapter.digest)
    model = node("IDAdapterApply", unet(kind), loaded, identity, 1.0, 0.0, 1.0, None)
    assert difference(draw(model, kind), draw(apply(unet(kind), kind, person(kind)), kind)) < 0.02
    assert next(loaded.adapter.layers.parameters()).dtype == dtype
